"""A few processes with one process group, that run a function of a test module side by side."""

import contextlib
import datetime
import multiprocessing
import os
import traceback

import pytest
import torch
import torch.distributed as dist
from processes import SECONDS
from torch.distributed.device_mesh import DeviceMesh

# All ranks are on this host, whose name may resolve slowly or not at all.
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}


class Ranks:
    def __init__(self, device, size, directory):
        # A rank is forked from a server that has imported what takes seconds, and has touched no GPU.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["mla_fp8", "pytest", "torch.distributed.tensor.experimental"])
        self.pipes, self.processes = [], []
        for rank in range(size):
            pipe, theirs = context.Pipe()
            arguments = (theirs, device, rank, size, f"file://{directory}/rendezvous")
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(pipe)
            self.processes.append(process)
        self._answers("start")

    def run(self, function, *arguments):
        """What `function(mesh, *arguments)` returns on each rank; fails with the traceback of the first that raises."""
        for pipe in self.pipes:
            with contextlib.suppress(BrokenPipeError):  # its rank ended, as the answers will tell
                pipe.send((function, arguments))
        return self._answers(function.__name__)

    def _answers(self, what):
        """One of each rank, within SECONDS; a rank that has none ends them all: others may wait for it."""
        results = []
        for rank, pipe in enumerate(self.pipes):
            try:
                if not pipe.poll(SECONDS):
                    self._fail(f"rank {rank} gave no answer to {what} within {SECONDS} s")
                error, result = pipe.recv()
            except (EOFError, ConnectionResetError):
                self.processes[rank].join(SECONDS)
                self._fail(f"rank {rank} ended in {what} with exit code {self.processes[rank].exitcode}")
            if error is not None:
                self._fail(f"{what} on rank {rank}:\n{error}")
            results.append(result)
        return results

    def _fail(self, message):
        self.stop()
        pytest.fail(message)

    @property
    def running(self):
        return all(process.is_alive() for process in self.processes)

    def stop(self):
        for process in self.processes:
            process.kill()
            process.join()


def _serve(pipe, device, rank, size, rendezvous):
    """One rank: run what comes through the pipe, until it closes."""
    try:
        mesh = _join(device, rank, size, rendezvous)
    except BaseException:
        pipe.send((traceback.format_exc(), None))
        return
    pipe.send((None, None))
    with contextlib.suppress(EOFError):
        while True:
            function, arguments = pipe.recv()
            try:
                answer = (None, function(mesh, *arguments))
            except BaseException:  # pytest.fail raises no Exception
                answer = (traceback.format_exc(), None)
            pipe.send(answer)
    dist.destroy_process_group()


def _join(device, rank, size, rendezvous):
    torch.set_num_threads(1)
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # read when torch.compile first runs: no pool beside each rank
    os.environ.update(LOOPBACK)
    backend = "gloo"
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
        if torch.cuda.device_count() >= size:  # NCCL wants a GPU for each rank
            backend = "nccl"
    limit = datetime.timedelta(seconds=SECONDS)
    dist.init_process_group(backend, init_method=rendezvous, rank=rank, world_size=size, timeout=limit)
    # init_device_mesh would put NCCL beside gloo wherever there is a GPU, and use it for tensors there.
    return DeviceMesh.from_group(dist.group.WORLD, device)
