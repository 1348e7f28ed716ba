"""Who begins next: in order of arrival for one owner, in turns for several."""

from edge_client.web.jobs.turns import MAX_PASSED, Turns


def drain(turns: Turns) -> list[str]:
    order = list(turns)
    assert [turns.position(job_id) for job_id in order] == list(range(len(order)))
    begun = []
    while (job_id := turns.pop()) is not None:
        begun.append(job_id)
    assert begun == order
    return begun


def test_one_owner_is_served_in_order() -> None:
    turns = Turns()
    for index, num_images in enumerate((10, 1, 3, 1)):
        turns.add(str(index), "a", num_images)
    turns.remove("2")

    assert ("2" in turns, "1" in turns, len(turns), turns.count("a")) == (False, True, 3, 3)
    assert drain(turns) == ["0", "1", "3"]
    assert (len(turns), turns.count("a"), turns.pop()) == (0, 0, None)


def test_a_newcomer_does_not_wait_for_a_flood() -> None:
    """It comes after one job of the other at most; then they take turns."""
    turns = Turns()
    for index in range(50):
        turns.add(f"a{index}", "a", 10)
    begun = [turns.pop(), turns.pop()]
    for index in range(2):
        turns.add(f"b{index}", "b", 10)

    assert begun == ["a0", "a1"]
    assert drain(turns)[:5] == ["b0", "a2", "b1", "a3", "a4"]


def test_turns_are_by_images() -> None:
    """Ten jobs of one image are one of ten."""
    turns = Turns()
    for index in range(3):
        turns.add(f"a{index}", "a", 10)
    for index in range(20):
        turns.add(f"b{index:02}", "b", 1)
    order = drain(turns)

    assert order[0] == "a0"
    assert order.index("a1") == 11
    assert order.index("a2") == 22


def test_who_was_away_saves_no_turns() -> None:
    """An owner that comes late has no claim to what others got before; one that had much has no debt for ever."""
    turns = Turns()
    for index in range(100):
        turns.add(f"a{index}", "a", 1)
        turns.pop()
    for index in range(3):
        turns.add(f"b{index}", "b", 1)
        turns.add(f"c{index}", "a", 1)

    assert drain(turns) == ["b0", "c0", "b1", "c1", "b2", "c2"]


def test_some_may_not_begin_yet() -> None:
    turns = Turns()
    for name in ("cloud", "edge", "more"):
        turns.add(name, "a", 1)

    assert turns.pop(lambda job_id: job_id == "edge") == "edge"
    assert turns.pop(lambda job_id: job_id == "edge") is None
    assert drain(turns) == ["cloud", "more"]


def test_a_cancelled_flood_is_no_debt() -> None:
    """What never began costs no turns: the jobs behind it move up."""
    turns = Turns()
    for index in range(50):
        turns.add(f"a{index}", "a", 10)
    assert turns.pop() == "a0"
    for index in range(1, 50):
        turns.remove(f"a{index}")
    for index in range(30):
        turns.add(f"b{index}", "b", 1)
    turns.add("again", "a", 1)

    assert drain(turns).index("again") <= 11


def test_turns_are_by_weight() -> None:
    """Twice the weight, twice the work done, whatever the size of the jobs."""
    turns = Turns()
    for index in range(12):
        turns.add(f"a{index:02}", "a", 10, weight=2)
        turns.add(f"b{index:02}", "b", 5)
    begun = drain(turns)[:12]
    work = {user: sum({"a": 10, "b": 5}[user] for each in begun if each[0] == user) for user in "ab"}

    assert abs(work["a"] - 2 * work["b"]) <= 10


def test_priority_comes_first_and_nobody_waits_for_ever() -> None:
    """Jobs with priority pass the others, in turns among themselves; each other one is passed by so many at most."""
    turns = Turns()
    for index in range(3):
        turns.add(f"a{index}", "a", 1)
    for index in range(2 * MAX_PASSED):
        turns.add(f"p{index:02}", "p", 1, has_priority=True)
    turns.add("q", "q", 1, has_priority=True)
    order = drain(turns)

    assert order.index("q") <= 1
    assert [order.index(f"a{index}") for index in range(3)] == [MAX_PASSED, 2 * MAX_PASSED + 1, 2 * MAX_PASSED + 3]
    assert turns.users == set()


def test_priority_that_passes_nobody_is_not_counted() -> None:
    turns = Turns()
    for index in range(3 * MAX_PASSED):
        turns.add(f"p{index}", "p", 1, has_priority=True)
        turns.pop()
    turns.add("a", "a", 1)
    turns.add("p", "p", 1, has_priority=True)

    assert drain(turns) == ["p", "a"]


def test_users_who_left_are_forgotten() -> None:
    """Addresses come and go: what is remembered of them does not grow."""
    turns = Turns()
    for index in range(5000):
        turns.add("job", f"address {index}", 1)
        turns.pop()

    assert sum(len(line._next) for line in turns._lines.values()) < 3000


def test_what_had_begun_comes_first_again() -> None:
    """In the order in which it came back, and the others of its user stay where they were."""
    turns = Turns()
    for job_id in ("a1", "a2", "a3"):
        turns.add(job_id, "a", 10)
    turns.add("b1", "b", 10)
    assert [turns.pop(), turns.pop()] == ["a1", "b1"]
    turns.begin("a3")  # elsewhere
    for job_id in ("a3", "a1"):
        turns.add(job_id, "a", 10, had_begun=True)
    turns.add("b2", "b", 10)
    before = list(turns)
    turns.remove("a3")

    assert before == ["a3", "a1", "a2", "b2"]
    assert list(turns) == ["a1", "a2", "b2"]
    assert turns.count("a") == 2
