"""Models of a running server as an operator loads and unloads them: real processes, the real process that loads."""

import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
import pytest

from deploy.run_demo import BIN, ENVIRONMENT, running_cloud
from hybridsd import codec
from hybridsd.v1 import denoising_service_pb2 as pb
from hybridsd.v1 import denoising_service_pb2_grpc
from tests.support.engine_fakes import message
from tests.support.loading import write_models
from tests.support.patience import HANG_S

pytestmark = pytest.mark.slow

Stub = denoising_service_pb2_grpc.DenoisingServiceStub


def models(address: str, *words: object) -> str:
    """Runs `hybridsd-cloud models`; returns all that it says."""
    command = [str(BIN / "hybridsd-cloud"), "models", *map(str, words), "--server", address]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False, timeout=HANG_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def latents(stub: Stub, **changes: object) -> np.ndarray:
    *_, state, _ = [each for each in stub.Denoise(message(**changes)) if each.WhichOneof("event") != "heartbeat"]
    return codec.decode_tensor(state.state.arrays[0], shape=(4, 8, 8), field="arrays")


def while_jobs_run(stub: Stub, act: Callable[[], None]) -> int:
    """Does something while jobs come one after the other; returns how many there were, none of which failed."""
    done, failed, num_jobs = threading.Event(), list[BaseException](), 0

    def run() -> None:
        try:
            act()
        except BaseException as error:
            failed.append(error)
        done.set()

    thread = threading.Thread(target=run)
    thread.start()
    while not done.is_set():
        latents(stub, seed=num_jobs)
        num_jobs += 1
        time.sleep(0.1)  # the load is to have some of this machine
    thread.join()
    if failed:
        raise failed[0]
    return num_jobs


def test_an_operator_loads_and_unloads_beside_jobs(tmp_path: Path) -> None:
    """Two workers of one processor, within a budget: jobs go on, and one of a model that is not loaded waits for it."""
    folders = write_models(tmp_path, "first", "second")
    options = [
        "--model", folders["first"], "--device", "cpu*2", "--dtype", "fp32", "--threads", "1", "--load-nice", "0",
        "--memory-budget", str(3 * 87184 / 2**30),
    ]  # fmt: skip
    with (
        running_cloud(options, tmp_path / "cloud.log") as (address, process),
        grpc.insecure_channel(address) as channel,
    ):
        stub = Stub(channel)
        before = latents(stub)
        assert while_jobs_run(stub, lambda: _ignore(models(address, "load", folders["second"]))) > 0
        plain = latents(stub, model="second")
        assert not np.array_equal(plain, before)
        assert "cpu: models take" in models(address, "list")
        models(address, "unload", "second", "--keep")
        states = {model.id: model.state for model in stub.GetCapabilities(pb.GetCapabilitiesRequest()).models}
        assert states == {"first": pb.MODEL_STATE_WARM, "second": pb.MODEL_STATE_COLD}
        assert np.array_equal(latents(stub, model="second"), plain)  # loaded again
        assert np.array_equal(latents(stub), before)
        models(address, "unload", "second", "--drain")
        with pytest.raises(grpc.RpcError, match="is not served"):
            latents(stub, model="second")
        assert process.poll() is None
    assert process.returncode == 0


def _ignore(_said: str) -> None:
    pass
