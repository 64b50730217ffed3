"""Where values stop being finite: the first module forward, the operator backward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mf_scale.models.outputs import Classifier, LayerPrediction, MaskPrediction
from mf_scale.training.replay.nonfinite import FirstModule, all_finite, backward_with_anomaly_detection


class Root(nn.Module):
    """The square root: infinite slope at 0, NaN below."""

    def forward(self, values: Tensor) -> dict[str, Tensor]:
        return {"root": values.sqrt()}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.root, self.last = nn.Linear(3, 3, bias=False), Root(), nn.Linear(3, 1)

    def forward(self, values: Tensor) -> Tensor:
        out: Tensor = self.last(self.root(self.first(values))["root"])
        return out.sum()


def net(diagonal: float = 1.0) -> Net:
    model = Net()
    with torch.no_grad():
        model.first.weight.copy_(torch.eye(3) * diagonal)
    return model


def first_of(model: nn.Module, given: Tensor) -> str | None:
    found = FirstModule()
    with found.watch(model):
        model(given)
    assert not any(module._forward_hooks for module in model.modules()), "hooks are taken off again"
    return found.found


def test_the_first_module_is_named_with_what_it_was_given():
    assert first_of(net(), torch.ones(1, 3)) is None
    assert first_of(net(-1.0), torch.ones(1, 3)) == "root (Root): its input was finite"
    assert first_of(net(), torch.tensor([[1.0, float("inf"), 1.0]])) == "first (Linear): its input was not finite"
    poisoned = net()
    with torch.no_grad():
        poisoned.last.bias.fill_(float("nan"))
    assert first_of(poisoned, torch.ones(1, 3)) == "last (Linear): bias of its own"


def test_values_are_found_wherever_they_are():
    @dataclass
    class Held:
        values: list[Tensor]

    bad = torch.tensor([1.0, float("nan")])
    assert all_finite([torch.ones(2), {"a": Held([torch.ones(1)])}, torch.tensor([2]), torch.ones(0), None, "nan"])
    for held in (bad, [bad], {"a": bad}, Held([bad]), (1, [Held([torch.ones(1), bad])])):
        assert not all_finite(held)
    good, sound = torch.ones(1), Classifier(torch.ones(1))
    aux, classifier = (LayerPrediction(good, bad),), Classifier(good, bad)
    assert all_finite(MaskPrediction(good, good, good, sound))
    assert not all_finite(MaskPrediction(good, good, good, sound, aux))
    assert not all_finite(MaskPrediction(good, good, good, classifier))


def test_the_operator_of_the_backward_pass_is_named_with_the_line_that_made_it():
    model = net()

    def loss() -> Tensor:
        # The slope of the root is infinite at 0, and 0 times that is NaN.
        return (model(torch.zeros(1, 3)) * 0).sum()

    assert backward_with_anomaly_detection(loss) is not None
    said = backward_with_anomaly_detection(loss)
    assert said is not None and said.startswith("SqrtBackward0, made in forward (") and "test_nonfinite.py" in said


def test_a_sound_backward_pass_leaves_its_gradient_and_no_mode_behind():
    model = net()
    assert backward_with_anomaly_detection(lambda: model(torch.ones(1, 3))) is None
    assert model.first.weight.grad is not None and not torch.is_anomaly_enabled()


def test_other_errors_pass():
    def loss() -> Tensor:
        raise RuntimeError("out of memory")

    try:
        backward_with_anomaly_detection(loss)
    except RuntimeError as error:
        assert "out of memory" in str(error)
    else:
        raise AssertionError("the error was swallowed")
    assert not torch.is_anomaly_enabled()
