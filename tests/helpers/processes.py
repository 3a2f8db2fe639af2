"""Processes of tests: those that start fast, and how to tell that one has ended."""

import multiprocessing
import os
import time

import psutil


def fork_server() -> multiprocessing.context.BaseContext:
    """Return a context whose processes are forked from a server that has imported torch and what tests run in them.

    Importing these takes a new process five seconds. The server is there when this returns.
    """
    context = multiprocessing.get_context("forkserver")
    modules = ["torch._dynamo", "pytest", "tests.helpers.tiny_data", "tests.helpers.training_fixtures"]
    context.set_forkserver_preload(modules)
    first = context.Process(target=os.getpid)
    first.start()
    first.join()
    return context


def gone(process: int, *, seconds: float = 120.0) -> bool:
    """Tell whether a process ends within some seconds (a zombie nobody waited for has ended)."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if psutil.Process(process).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False
