"""Triton kernels that take about a microsecond; node_gaps.py puts them into CUDA graphs."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait, globaltimer


@triton.jit
def add_one(x, elements: tl.constexpr):
    at = tl.arange(0, elements)
    tl.store(x + at, tl.load(x + at) + 1)


@triton.jit
def add_one_programmatic(x, elements: tl.constexpr):
    gdc_wait()
    at = tl.arange(0, elements)
    tl.store(x + at, tl.load(x + at) + 1)
    gdc_launch_dependents()


@triton.jit
def write_clock(clock, at):
    tl.store(clock + at, globaltimer())
