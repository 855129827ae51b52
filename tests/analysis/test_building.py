"""Building models."""
from builders import logged, small_lavit
from mmlavit.analysis.building import quiet


def test_quiet_says_nothing_of_initialisation_and_leaves_the_log_as_it_was():
    model = small_lavit()
    with logged() as before:
        model.init_weights()
    model = small_lavit()
    with logged() as messages, quiet():
        model.init_weights()
    assert not messages
    model = small_lavit()
    with logged() as after:
        model.init_weights()
    assert after == before
    assert any('LaViTInit' in message for message in after)
