"""num_anchors: an unbiased estimate, of loss and gradient, by anchors drawn at random."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pcoherence import PerceptionCoherenceLoss, perception_coherence_loss, reference
from pcoherence.testing import make_case, relative_error

M = 6
STUDENT, TEACHER = make_case("gaussian", M, 3, seed=1), make_case("gaussian", M, 4, seed=2)


def value_and_grad(**options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = STUDENT.clone().requires_grad_()
    loss = perception_coherence_loss(leaf, TEACHER, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weights", [None, [3.0, 1, 4, 1, 5, 9], [3.0, 0, 4, 1, 0, 9]])
@pytest.mark.parametrize("drawn", [3, 5])  # 5: more than are not padding
def test_the_mean_over_all_draws_is_the_whole_loss(
    reduction: str, weights: list[float] | None, drawn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the cyclic shifts of those that weigh something, each is drawn equally often."""
    given = None if weights is None else torch.tensor(weights).double()
    options: dict[str, Any] = {"reduction": reduction, "anchor_weights": given}
    counting = torch.arange(M) if given is None else given.nonzero()[:, 0]
    padding = torch.tensor([i for i in range(M) if i not in counting], dtype=torch.int64)
    found = []
    for shift in range(len(counting)):
        order = torch.cat([padding, counting.roll(shift)])
        monkeypatch.setattr(torch, "randperm", lambda *a, order=order, **k: order)
        found.append(value_and_grad(num_anchors=drawn, **options))
    loss, gradient = (torch.stack(part).mean(0) for part in zip(*found, strict=True))
    expected_loss, expected_gradient = value_and_grad(**options)
    assert relative_error(loss, expected_loss) < 1e-12
    assert relative_error(gradient, expected_gradient) < 1e-10


def test_a_generator_repeats_the_draw_everywhere() -> None:
    options = {"num_anchors": 3, "reduction": "none"}
    found = [
        function(STUDENT, TEACHER, generator=torch.Generator().manual_seed(7), **options)
        for function in (perception_coherence_loss, reference.perception_coherence_loss)
    ]
    found.append(
        PerceptionCoherenceLoss(**options)(
            STUDENT, TEACHER, generator=torch.Generator().manual_seed(7)
        )
    )
    assert all(loss.count_nonzero() == 3 for loss in found)
    torch.testing.assert_close(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_nothing_but_padding() -> None:
    loss, gradient = value_and_grad(num_anchors=2, anchor_weights=torch.zeros(M).double())
    assert loss == 0
    assert not gradient.any()


def test_more_than_there_are_takes_all() -> None:
    assert torch.equal(value_and_grad(num_anchors=M)[0], value_and_grad()[0])


@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (-3, ValueError), (2.0, TypeError), (True, TypeError)]
)
def test_bad_numbers(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^num_anchors: expected an int of at least 1; got"):
        PerceptionCoherenceLoss(num_anchors=value)


def test_compiled_at_more_sizes_than_torch_compiles_anew_for() -> None:
    torch._dynamo.reset()
    criterion = PerceptionCoherenceLoss(num_anchors=4)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    for m in range(3, 25):  # fewer than num_anchors among them
        student = make_case("gaussian", m, 3, seed=m).requires_grad_()
        teacher = make_case("gaussian", m, 4, seed=m + 100)
        torch.manual_seed(m)
        found = compiled(student, teacher)
        torch.manual_seed(m)
        expected = criterion(student, teacher)
        gradients = (torch.autograd.grad(loss, student)[0] for loss in (found, expected))
        assert torch.equal(found, expected)
        assert torch.equal(*gradients)


def test_a_compiled_graph_holds_no_generator() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        PerceptionCoherenceLoss(num_anchors=4), fullgraph=True, backend="aot_eager"
    )
    message = r"generator: expected None under torch\.compile.*torch\.manual_seed seeds the draw"
    with pytest.raises(torch._dynamo.exc.Unsupported, match=message):
        compiled(STUDENT, TEACHER, generator=torch.Generator())
