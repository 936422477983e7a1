# SPDX-License-Identifier: Apache-2.0
"""Restoring in a job of two processes: each reads only what it holds, and can restore alone."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from k3jax.config import TextEncoderConfig, TextProjectionConfig

from checkpoints import (
    CONFIG,
    disk_arrays,
    write,
)


PROCESS = """
    import json
    import pathlib
    import sys
    import jax
    import numpy as np
import pytest
    from k3jax.checkpoints.restore import restore
    from k3jax.sharding import make_mesh

    rank, address, path = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    jax.distributed.initialize(address, 2, rank)
    def bytes_read():
        return int(open("/proc/self/io").readline().split()[1])

    mesh = make_mesh("fsdp=8")
    restore(path, "text_projection", mesh=mesh)  # warms up
    before = bytes_read()
    module = restore(path, "text_encoder", mesh=mesh, verify=False)
    found = {"read": bytes_read() - before, "alone": False}
    for shard in module.layers.mlp.wi_0.kernel.get_value().addressable_shards:
        rows = np.arange(2048)[shard.index[1]]
        assert (np.asarray(shard.data) == rows[None, :, None]).all()
    if rank == 1:  # alone, without waiting for the other
        local = make_mesh("fsdp=4", jax.local_devices())
        restore(path, "text_encoder", mesh=local)
        found["alone"] = True
    pathlib.Path(sys.argv[4]).write_text(json.dumps(found))  # Gloo's threads print to stdout
"""


@pytest.mark.slow
def test_each_of_two_processes_reads_its_half(tmp_path):
    config = dataclasses.replace(
        CONFIG,
        text_encoder=TextEncoderConfig(8, 2048, 8, 1024, num_layers=2, num_heads=1),
        text_projection=TextProjectionConfig(2048, 8),
    )
    encoder = {
        name: np.broadcast_to(np.arange(len(a), dtype=np.float32)[:, None], a.shape)
        if name.endswith("wi_0.kernel")
        else a
        for name, a in disk_arrays("text_encoder", config).items()
    }
    write(tmp_path / "c", encoder, disk_arrays("text_projection", config), config=config)
    total = sum(a.nbytes for a in encoder.values())
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", textwrap.dedent(PROCESS)]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    answers = [tmp_path / f"{rank}.json" for rank in range(2)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), address, str(tmp_path / "c"), str(answer)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, answer in enumerate(answers)
    ]
    for rank, process in enumerate(processes):
        try:
            _, err = process.communicate(timeout=180)
        finally:
            process.kill()
        assert process.returncode == 0, err
        found = json.loads(answers[rank].read_text())
        assert 0.45 * total < found["read"] < 0.75 * total
        assert found["alone"] == (rank == 1)
