"""The learning rate of a step schedule, and the options that would do nothing."""

from __future__ import annotations

import pytest

from mf_scale.config.load import load_config
from mf_scale.config.schema import ScheduleConfig
from mf_scale.config.validate import validate
from mf_scale.errors import UserError
from mf_scale.training.schedule import lr_factor


def test_a_step_schedule_multiplies_at_each_milestone():
    config = ScheduleConfig(name="step", milestones=[10, 20], gamma=0.1)
    factors = [lr_factor(config, update, 30) for update in (0, 9, 10, 19, 20, 29)]
    assert factors == pytest.approx([1.0, 1.0, 0.1, 0.1, 0.01, 0.01])


def test_warm_up_multiplies_the_step_schedule():
    config = ScheduleConfig(name="step", milestones=[5], gamma=0.5, warmup_updates=10, warmup_start=0.0)
    assert [lr_factor(config, update, 30) for update in (0, 4, 5, 10)] == pytest.approx([0.0, 0.4, 0.25, 0.5])


def test_the_factor_does_not_depend_on_what_was_asked_before():
    config = ScheduleConfig(name="step", milestones=[369_600], gamma=0.1, warmup_updates=1500)
    forwards = [lr_factor(config, update, 554_400) for update in range(0, 554_400, 9_240)]
    backwards = [lr_factor(config, update, 554_400) for update in reversed(range(0, 554_400, 9_240))]
    assert forwards == backwards[::-1] and forwards[40] == pytest.approx(0.1) and forwards[39] == 1.0


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["schedule.name=step"], "schedule.name = step needs schedule.milestones"),
        (["schedule.milestones=[5]"], r"does nothing with schedule.name = poly"),
        (["schedule.name=constant", "schedule.milestones=[5]"], "does nothing with schedule.name = constant"),
        (["schedule.name=step", "schedule.milestones=[20,10]"], "each later than the one before"),
        (["schedule.name=step", "schedule.milestones=[10,10]"], "each later than the one before"),
        (["schedule.name=step", "schedule.milestones=[0,10]"], "above 0"),
        (["schedule.name=step", "schedule.milestones=[5]", "schedule.gamma=0"], "schedule.gamma = 0.0 must be above 0"),
    ],
)
def test_milestones_that_cannot_be_are_refused(overrides: list[str], said: str):
    with pytest.raises(UserError, match=said):
        validate(load_config(None, overrides))


def test_milestones_in_order_are_taken():
    validate(load_config(None, ["schedule.name=step", "schedule.milestones=[327778,355092]"]))
