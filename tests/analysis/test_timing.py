"""What is measured of a step, not how fast it is."""
import statistics

import pytest
import torch

from mmlavit.analysis.timing import (Spread, operator_table, peak_memory,
                                     time_in_turn)


def test_memory_is_that_of_the_tensors_alive_at_once():
    def step():
        first = torch.ones(1000, 250)  # 1 MB
        second = first + 1
        del first
        third = second * 2  # in place of the first
        return third

    step()
    assert peak_memory(step, 'cpu') == pytest.approx(2, rel=.01)


def test_steps_take_turns_and_warm_up_is_not_counted():
    calls = []
    times = time_in_turn({name: lambda name=name: calls.append(name)
                          for name in 'ab'}, rounds=3, warmup=2, device='cpu')
    assert calls == ['a', 'b'] * 5
    assert [len(times[name]) for name in 'ab'] == [3, 3]
    assert all(value > 0 for values in times.values() for value in values)


def test_spread_of_a_known_sample():
    spread = Spread.of(range(101))
    assert spread == (10, 50, 90)
    few = Spread.of([1., 3.])
    assert few.median == statistics.median([1, 3]) and few.p10 < 2 < few.p90


def test_operators_are_named():
    a = torch.rand(50, 50)
    assert 'aten::mm' in operator_table(lambda: a @ a)
