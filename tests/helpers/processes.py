"""Two real processes of one run."""

import socket

import torch

from training.distributed import Processes, processes_of_environment


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def environment(rank: int, port: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def join_one_of_two(rank: int, port: int) -> Processes:
    """This process as one of two that meet at the port, on one thread."""
    torch.set_num_threads(1)
    processes = processes_of_environment(environment(rank, port))
    processes.join(torch.device("cpu"))
    return processes
