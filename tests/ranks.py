"""A few processes with one process group, that run a function of a test module side by side."""

import contextlib
import multiprocessing
import traceback

import pytest
import torch
import torch.distributed as dist

SECONDS = 120  # for one function, the first one's imports too


class Ranks:
    def __init__(self, device, size, directory):
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(size):
            pipe, theirs = context.Pipe()
            arguments = (theirs, device, rank, size, f"file://{directory}/rendezvous")
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(pipe)
            self.processes.append(process)

    def run(self, function, *arguments):
        """What `function(mesh, *arguments)` returns on each rank; fails with the traceback of the first that raises."""
        for pipe in self.pipes:
            pipe.send((function, arguments))
        results = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(SECONDS):
                self.stop()
                pytest.fail(f"rank {rank} gave no answer within {SECONDS} s")
            error, result = pipe.recv()
            results.append(result)
            if error is not None:
                self.stop()  # the other ranks may wait for this one in a collective
                pytest.fail(f"on rank {rank}:\n{error}")
        return results

    @property
    def running(self):
        return all(process.is_alive() for process in self.processes)

    def stop(self):
        for process in self.processes:
            process.kill()
            process.join()


def _serve(pipe, device, rank, size, rendezvous):
    """One rank: run what comes through the pipe, until it closes."""
    torch.set_num_threads(1)
    backend = "gloo"
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
        if torch.cuda.device_count() >= size:  # NCCL wants a GPU for each rank
            backend = "nccl"
    dist.init_process_group(backend, init_method=rendezvous, rank=rank, world_size=size)
    mesh = dist.init_device_mesh(device, (size,))
    with contextlib.suppress(EOFError):
        while True:
            function, arguments = pipe.recv()
            try:
                answer = (None, function(mesh, *arguments))
            except BaseException:  # pytest.fail raises no Exception
                answer = (traceback.format_exc(), None)
            pipe.send(answer)
    dist.destroy_process_group()
