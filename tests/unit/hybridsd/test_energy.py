"""Energy: counters of fake machines, who gets what of them, and what is estimated without one."""

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from hybridsd import energy
from hybridsd.energy import Energy, Macs, Meter, Model, NvmlCounter, RaplCounter


def zone(root: Path, name: str, energy_uj: int, *, kind: str = "package-0", range_uj: int = 1_000_000) -> Path:
    """Writes a zone as Linux shows it."""
    folder = root / name
    folder.mkdir(exist_ok=True)
    (folder / "name").write_text(f"{kind}\n")
    (folder / "energy_uj").write_text(f"{energy_uj}\n")
    (folder / "max_energy_range_uj").write_text(f"{range_uj}\n")
    return folder


class Counter:
    """A counter that a test moves."""

    def __init__(self) -> None:
        self.joules = 100.0
        self.is_broken = False

    def read_j(self) -> float:
        if self.is_broken:
            raise OSError("gone")
        return self.joules


def test_a_sum_is_as_sure_as_its_least_sure_part() -> None:
    assert Energy(1.0, "measured") + Energy(2.0, "measured") == Energy(3.0, "measured")
    assert Energy(1.0, "measured") + Energy(2.0, "modelled") == Energy(3.0, "modelled")


def test_packages_are_added_and_their_parts_are_not(tmp_path: Path) -> None:
    """A core zone is inside its package, the platform's contains them, and a wrap-around is a rise."""
    zone(tmp_path, "intel-rapl:0", 900_000)
    zone(tmp_path, "intel-rapl:0:0", 5, kind="core")
    zone(tmp_path, "intel-rapl:1", 100_000, kind="package-1")
    zone(tmp_path, "intel-rapl:2", 7, kind="psys")
    counter = RaplCounter(tmp_path)
    begin = counter.read_j()
    zone(tmp_path, "intel-rapl:0", 200_000)  # past its range of 1 J
    zone(tmp_path, "intel-rapl:0:0", 900_000, kind="core")
    zone(tmp_path, "intel-rapl:1", 150_000, kind="package-1")
    zone(tmp_path, "intel-rapl:2", 900_000, kind="psys")

    assert counter.read_j() - begin == pytest.approx(0.3 + 0.05)


def test_what_cannot_be_read_says_why(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="shows no RAPL counters"):
        RaplCounter(tmp_path)
    (zone(tmp_path, "intel-rapl:0", 1) / "energy_uj").write_text("nonsense")
    with pytest.raises(OSError, match="energy_uj"):
        RaplCounter(tmp_path)


def test_a_counter_without_rights_is_modelled_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zone(tmp_path, "intel-rapl:0", 1)

    def refuse(path: Path, **_: object) -> str:
        raise PermissionError(path)

    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    monkeypatch.setattr(RaplCounter.__init__, "__defaults__", (tmp_path,))
    monkeypatch.setattr(Path, "read_text", refuse)
    counter, why = energy.find_counter("cpu")

    assert counter is None
    assert "chmod a+r" in why


def test_a_gpu_is_found_by_its_uuid() -> None:
    asked = []

    class NVMLError(Exception):
        pass

    def handle(uuid: str) -> str:
        asked.append(uuid)
        return "gpu"

    nvml = SimpleNamespace(
        NVMLError=NVMLError, nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=handle,
        nvmlDeviceGetHandleByIndex=lambda index: index, nvmlDeviceGetTotalEnergyConsumption=lambda _: 2500,
    )  # fmt: skip
    assert NvmlCounter("abc", nvml).read_j() == 2.5
    assert asked == ["GPU-abc"]

    def fail(_: object) -> int:
        raise NVMLError("not supported")

    nvml.nvmlDeviceGetTotalEnergyConsumption = fail
    with pytest.raises(OSError, match="not supported"):
        NvmlCounter(None, nvml)


def test_work_at_once_shares_and_idle_time_is_nobodys() -> None:
    counter = Counter()
    meter = Meter(counter)
    counter.joules += 50  # idle
    with meter.measure() as one:
        counter.joules += 10
        with meter.measure() as other:
            counter.joules += 6
        counter.joules += 1
    counter.joules += 50

    assert (one.joules, other.joules) == (14.0, 3.0)


def test_a_counter_that_breaks_makes_the_work_unknown_not_wrong() -> None:
    counter = Counter()
    meter = Meter(counter)
    with meter.measure() as work:
        counter.is_broken = True
    counter.is_broken = False
    with meter.measure() as later:
        counter.joules += 2

    assert work.joules is None
    assert later.joules == 2.0
    with Meter(None).measure() as unknown:
        pass
    assert unknown.joules is None


def test_threads_together_get_all_that_was_taken() -> None:
    counter, meters = Counter(), []
    meter, barrier = Meter(counter), threading.Barrier(4)

    def work() -> None:
        barrier.wait()
        for _ in range(200):
            with meter.measure() as share:
                pass
            meters.append(share)

    with meter.measure() as whole:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(500):
            counter.joules += 1
        for thread in threads:
            thread.join()

    assert sum(share.joules or 0.0 for share in (*meters, whole)) == pytest.approx(500.0)


def test_a_polynomial_is_found_from_its_points() -> None:
    macs = Macs.fit([(cells, 7 + 3 * cells + 2 * cells**2) for cells in (16, 64, 144)])

    assert macs.coefficients == (7.0, 3.0, 2.0)
    assert macs.at(4096) == 7 + 3 * 4096 + 2 * 4096**2
    assert Macs.fit([(0, 5)]).at(4096) == 5


def test_watts_come_before_macs_and_nothing_is_invented() -> None:
    assert Model(1e-10).energy(2e9, 99.0) == Energy(pytest.approx(0.2), "modelled")
    assert Model(1e-10, watts=5.0).energy(2e9, 2.0) == Energy(10.0, "modelled")
    assert Model(1e-10).energy(None, 2.0) is None


@pytest.mark.parametrize("joules", [float("nan"), float("inf"), -1.0, 1e300])
def test_what_nobody_can_have_taken_is_not_believed(joules: float) -> None:
    assert energy.read(joules, is_measured=True) is None
