"""Tests run on one torch thread: with two, small networks are ten to fifty times slower on a busy machine."""

import torch as th

th.set_num_threads(1)
