# SPDX-License-Identifier: Apache-2.0
"""Processes of several hosts as one program with one mesh, by jax.distributed."""

import argparse
import re


def add_distributed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--distributed",
        metavar="auto|HOST:PORT,N,I",
        help="join the processes of all hosts to one mesh: found by JAX (TPU pods, GKE, SLURM, "
        "Open MPI), or the address of process 0, how many there are, and which this is (from 0)",
    )


def join(distributed: str | None) -> None:
    """Joins the other processes; before anything else of JAX. None: this process is alone.

    Raises:
        ValueError: the text is neither, or nothing tells of other processes.
    """
    if distributed is None:
        return
    explicit = re.fullmatch(r"([^,\s]+:\d+),(\d+),(\d+)", distributed)
    if distributed != "auto" and (explicit is None or int(explicit[3]) >= int(explicit[2])):
        raise ValueError(
            f"--distributed is {distributed!r}; it must be auto, or HOST:PORT,N,I with the address "
            "of process 0, the number of processes, and the number of this one, from 0 to N - 1."
        )

    import jax

    if explicit is not None:
        jax.distributed.initialize(explicit[1], int(explicit[2]), int(explicit[3]))
        return
    try:
        jax.distributed.initialize()
    except ValueError as error:
        raise ValueError(
            "--distributed auto finds nothing here that tells of other processes (a TPU pod, GKE, "
            "SLURM, Open MPI): give --distributed HOST:PORT,N,I."
        ) from error


def writes() -> bool:
    """Whether this is the process that writes what all of them have made."""
    import jax

    return jax.process_index() == 0
