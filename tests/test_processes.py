"""Two processes that work as one, as on two hosts; each has devices of its own."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from home import make
from tiny import CONFIG, model_and_params

import splitq_jax as sq
from splitq_jax import models
from splitq_jax.cli import main
from splitq_jax.processes import by_first, is_first

SHARE_A_MESH = """
import sys
import jax
jax.distributed.initialize()
import numpy as np
import splitq_jax as sq
from jax.sharding import AxisType
from functools import partial
from pathlib import Path
from splitq_jax import calib, models, processes, sharding
from splitq_jax.calib.run import Run

home = sys.argv[1]
mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
model, params = models.load(f"{home}/model", mesh=mesh)
kernel = params["decoder"]["blocks_0"]["o"]["kernel"]
assert not kernel.is_fully_addressable and len(kernel.addressable_shards) == 4
sq.save(f"{home}/saved_by_two", params)  # each holds half
for name in ("saved", "saved_by_two"):
    saved, _ = sq.restore(f"{home}/{name}", mesh=mesh)  # each checksum is of the whole array
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(saved), strict=True):
        assert a.sharding == b.sharding
        np.testing.assert_array_equal(sharding.on_host(a), sharding.on_host(b))


def refused(do):
    try:
        do()
    except sq.InputError as error:
        return str(error)


def fail_in(process):
    if jax.process_index() == process:
        raise sq.InputError("one fails")


# what one must not do, both are told
assert "exists" in refused(lambda: sq.save(f"{home}/saved", params))
run = Run(f"{home}/run", "first")
theta = {"a": sharding.spread(np.arange(8.0), sharding.sharding("a", (8,), mesh))}
run.save(0, theta, (2.0, 1.0))
found, errors = run.load(0, theta)
assert errors == (2.0, 1.0) and run.load(1, theta) is None
np.testing.assert_array_equal(found["a"], np.arange(8.0))
run.close()
assert "of another run" in refused(lambda: Run(f"{home}/run", "second"))
assert processes.by_first(jax.process_index) == 0
assert len(processes.by_first(lambda: bytes(100_000))) == 100_000
own = jax.process_index()
assert "process 1 of 2: one fails" in str(refused(lambda: processes.together(partial(fail_in, 1)))) or own == 1
assert "process 1 has others" in refused(lambda: processes.check_alike("files", lambda: str(own)))
processes.check_alike("files", lambda: "same")
(Path(home) / "file").touch()
assert refused(lambda: sq.save(f"{home}/file/below", params))  # cannot be made; the other one has its part to give all the same
assert "on_host=True" in refused(lambda: calib.collect(model, params, [{}]))
print("done")
"""


def start(*command: str | Path, devices: int) -> list[str]:
    """Run a command in two processes, as Open MPI starts them; returns what each printed."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    cluster = {
        "OMPI_MCA_orte_hnp_uri": f"1.0;tcp://127.0.0.1:{port}",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    }
    flags = {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
        "JAX_COORDINATOR_PORT": str(port),
    }
    both = [
        subprocess.Popen(
            [str(part) for part in command],
            env=os.environ | cluster | flags | {"OMPI_COMM_WORLD_RANK": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    try:
        said = [process.communicate(timeout=300)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], said
    return said


@pytest.mark.slow
def test_two_processes_share_a_mesh(tmp_path: Path) -> None:
    models.export(tmp_path / "model", CONFIG, model_and_params()[1], {})
    sq.save(tmp_path / "saved", models.load(tmp_path / "model")[1])
    assert all("done" in said for said in start(sys.executable, "-c", SHARE_A_MESH, tmp_path, devices=4))


@pytest.mark.slow
def test_two_processes_quantize(tmp_path: Path) -> None:
    """They find what one finds: the same codes, and scales, transforms and gates but for the order of a sum."""
    home = make(tmp_path)
    flags = ["--data", home / "set.jsonl", "--samples", 4, "--split-rate", 0.06, "--split-align", 2, "--steps", 2]
    command = ["quantize", home / "model", *map(str, flags), "--sites", "decoder/blocks_*/o", "decoder/blocks_*/down"]
    splitq = [sys.executable, "-m", "splitq_jax.cli"]
    first, other = start(*splitq, *command, "--out", home / "two", "--distributed", devices=2)
    assert "Wrote" in first and "Wrote" not in other and not (home / "two.run").exists()
    assert main([str(a) for a in (*command, "--out", home / "one")]) == 0
    (one, made_alone), (two, made_together) = (sq.restore(home / name / "params") for name in ("one", "two"))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        if a.dtype == np.float32:
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        else:
            np.testing.assert_array_equal(a, b)
    assert made_alone["recipe"] == made_together["recipe"]


def test_alone_every_process_is_the_first() -> None:
    assert is_first() and by_first(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        by_first(lambda: 1 // 0)


def test_nobody_to_join(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["calibrate", str(tmp_path), "--out", str(tmp_path / "out"), "--distributed"]) == 2
    assert "TPU pods" in capsys.readouterr().err
