"""cached_backward: the gradient of the whole batch, from one chunk's activations at a time."""

from __future__ import annotations

import functools
import warnings
from collections import UserDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import join_group, run_in_processes
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from pcoherence import CandidateBank, PerceptionCoherenceLoss, cached, cached_backward
from pcoherence.adapters.sentence_transformers import CachedCoherenceDistillationLoss
from pcoherence.testing import make_case, relative_error

N = 12
CHUNKS = (1, 4, 5, N, 50)
"""One point, a divisor of n, not one, all points and more than there are."""
X = make_case("gaussian", N, 6, dtype=torch.float32, seed=0)
MASK = make_case("gaussian", N, 6, dtype=torch.float32, seed=1) > 0
TEACHER = make_case("gaussian", N, 5, dtype=torch.float32, seed=2)


class Network(nn.Module):
    """Takes what the kinds of inputs bring, and draws random numbers twice if asked to."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, values: Tensor, mode: str = "plain", mask: Any = None, scale: Any = None
    ) -> Tensor:
        assert mode in ("plain", "tanh")
        if mask is not None:
            values = values * mask
        hidden = self.dropout(self.first(values).tanh())
        embeddings = self.dropout(self.second(hidden))
        embeddings = embeddings.tanh() if mode == "tanh" else embeddings
        return embeddings if scale is None else scale * embeddings


SCALE = torch.tensor(0.5)
INPUTS: dict[str, Any] = {
    "tensor": X,
    "tuple": (X, "tanh"),
    "list": [X, "tanh", MASK],
    "dict": {"values": X, "mask": MASK, "mode": "tanh", "scale": SCALE},
    "mapping": UserDict(values=X, mask=MASK, scale=SCALE),
}


def call(network: Callable[..., Tensor], inputs: Any) -> Tensor:
    if isinstance(inputs, Tensor):
        return network(inputs)
    return network(*inputs) if isinstance(inputs, (tuple, list)) else network(**inputs)


def by_chunks(network: nn.Module, x: Tensor, chunk: int) -> Tensor:
    """What draws random numbers does so chunk by chunk, as one cached pass does."""
    return torch.cat([network(part) for part in x.split(chunk)])


def gradient(network: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


def assert_same(found: nn.Module, expected: nn.Module, tolerance: float = 1e-6) -> None:
    assert gradient(expected).any()
    assert relative_error(gradient(found), gradient(expected)) < tolerance


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("kind", INPUTS)
def test_equals_the_whole_batch(kind: str, chunk: int) -> None:
    network, alone, criterion = Network(), Network(), PerceptionCoherenceLoss()
    loss = cached_backward(network, INPUTS[kind], criterion, TEACHER, chunk)
    expected = criterion(call(alone, INPUTS[kind]), TEACHER)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    assert not loss.requires_grad
    assert_same(network, alone)


def test_gradients_are_added_to_those_that_there_are() -> None:
    network, alone, criterion = Network(), Network(), PerceptionCoherenceLoss()
    for step in range(2):
        x = X + step
        cached_backward(network, x, criterion, TEACHER, 5, factor=0.5)
        (0.5 * criterion(alone(x), TEACHER)).backward()
    assert_same(network, alone)


def test_a_factor_leaves_the_loss_as_it_is() -> None:
    network, criterion = Network(), PerceptionCoherenceLoss()
    whole = cached_backward(network, X, criterion, TEACHER, 5)
    assert cached_backward(network, X, criterion, TEACHER, 5, factor=0.25) == whole


@pytest.mark.parametrize("chunk", CHUNKS)
def test_dropout_draws_the_same_masks_in_both_passes(chunk: int) -> None:
    """And the generator stands where one pass leaves it, with what the criterion draws."""
    network, alone = Network(dropout=0.5), Network(dropout=0.5)
    criterion = PerceptionCoherenceLoss(num_anchors=5)
    seen: list[Tensor] = []
    network.dropout.register_forward_hook(lambda m, i, found: seen.append(found != 0))
    torch.manual_seed(1)
    loss = cached_backward(network, X, criterion, TEACHER, chunk)
    after = torch.get_rng_state()
    half = len(seen) // 2
    assert half == 2 * -(-N // chunk)
    assert all(torch.equal(*pair) for pair in zip(seen[:half], seen[half:], strict=True))
    assert not torch.equal(seen[0], torch.ones_like(seen[0]))

    torch.manual_seed(1)
    expected = criterion(by_chunks(alone, X, chunk), TEACHER)
    assert torch.equal(torch.get_rng_state(), after)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    assert_same(network, alone)


def test_the_generator_is_put_back_after_an_error() -> None:
    network = Network(dropout=0.5)
    calls = []

    def once(x: Tensor) -> Tensor:
        calls.append(len(x))
        if len(calls) == 4:
            raise KeyError("the second pass")
        return network(x)

    torch.manual_seed(1)
    with torch.no_grad():
        by_chunks(network, X, 6)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    with pytest.raises(KeyError):
        cached_backward(once, X, PerceptionCoherenceLoss(), TEACHER, 6)
    assert torch.equal(torch.get_rng_state(), after)


def test_generators_of_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is none here: a device whose generator is a number stands for it."""

    class Device:
        state = 0

        def get_rng_state(self, device: torch.device) -> int:
            assert device == torch.device("cuda", 1)
            return self.state

        def set_rng_state(self, state: int, device: torch.device) -> None:
            self.state = state

    device = Device()
    monkeypatch.setattr(cached, "_module_of", lambda _: device)
    seen = []

    def embed() -> Tensor:
        seen.append(device.state)
        device.state += 1
        return leaf * 2

    leaf = torch.zeros(2, 2, requires_grad=True)
    first_pass = cached.CachedPass("student", [embed, embed], [], [torch.device("cuda", 1)])
    first_pass.embeddings()
    device.state = 7
    first_pass.backward([torch.ones(2, 2)] * 2)
    assert seen == [0, 1, 0, 1]
    assert device.state == 7


@pytest.mark.parametrize("chunk", CHUNKS)
def test_autocast_holds_in_both_passes(chunk: int) -> None:
    """Weights that it converted in the first pass, without a graph, get gradients in the second.

    torch sees to that from 2.11 on.
    """
    network, alone, criterion = Network(), Network(), PerceptionCoherenceLoss()
    dtypes = []
    network.second.register_forward_hook(lambda m, i, found: dtypes.append(found.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        loss = cached_backward(network, X, criterion, TEACHER, chunk)
        expected = criterion(alone(X), TEACHER)
    expected.backward()
    assert set(dtypes) == {torch.bfloat16}
    torch.testing.assert_close(loss, expected.detach())
    # Each chunk rounds its share of a weight's gradient to 8 bits.
    assert_same(network, alone, 2**-8 if chunk < N else 1e-6)
    assert len(gradient(network)) == sum(p.numel() for p in network.parameters())


def test_a_scaler_and_a_factor() -> None:
    network, alone, criterion = Network(), Network(), PerceptionCoherenceLoss()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    loss = cached_backward(network, X, criterion, TEACHER, 5, scaler=scaler, factor=0.5)
    expected = criterion(alone(X), TEACHER)
    (512 * expected).backward()
    torch.testing.assert_close(loss, expected.detach())
    assert_same(network, alone)
    scaler.step(optimizer)
    scaler.update()
    moved = network.second.bias - alone.second.bias
    torch.testing.assert_close(-moved, alone.second.bias.grad / 1024)


def test_a_bank_is_filled_once_for_each_batch() -> None:
    network, alone = Network(), Network()
    ours, theirs = (PerceptionCoherenceLoss(bank=CandidateBank(20)) for _ in range(2))
    for step in range(3):
        x = X + step
        loss = cached_backward(network, x, ours, TEACHER, 5)
        expected = theirs(alone(x), TEACHER)
        expected.backward()
        torch.testing.assert_close(loss, expected.detach())
        assert len(ours.bank) == min(20, N * (step + 1))
    assert_same(network, alone)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_options_of_the_criterion(reduction: str) -> None:
    """Anchors that a generator draws, and weights, by a function around the criterion."""
    network, alone = Network(), Network()
    criterion = PerceptionCoherenceLoss(num_anchors=4, reduction=reduction)

    def bound() -> Callable[..., Tensor]:
        given = {"generator": torch.Generator().manual_seed(3), "anchor_weights": torch.arange(N)}
        return functools.partial(criterion, **given)

    loss = cached_backward(network, X, bound(), TEACHER, 5)
    expected = bound()(alone(X), TEACHER)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    assert_same(network, alone)


def test_any_criterion_and_its_own_parameters() -> None:
    network, alone = Network(), Network()
    head, other = nn.Linear(3, 5), nn.Linear(3, 5)
    other.load_state_dict(head.state_dict())
    cached_backward(network, X, lambda s, t: (head(s) - t).square().mean(), TEACHER, 5)
    (other(alone(X)) - TEACHER).square().mean().backward()
    assert_same(network, alone)
    assert_same(head, other)


@pytest.mark.parametrize("kind", INPUTS)
def test_a_teacher_that_is_a_network(kind: str) -> None:
    teacher, network, alone = Network(dropout=0.5), Network(), Network()
    teacher.first.weight.data.mul_(torch.linspace(1, 4, 6))  # or the student would have learnt all
    criterion, sizes = PerceptionCoherenceLoss(), []

    def watched(*args: Any, **named: Any) -> Tensor:
        embeddings = teacher(*args, **named)
        assert not embeddings.requires_grad
        sizes.append(len(embeddings))
        return embeddings

    teacher.eval()
    loss = cached_backward(network, INPUTS[kind], criterion, watched, 5)
    expected = criterion(call(alone, INPUTS[kind]), call(teacher, INPUTS[kind]).detach())
    expected.backward()
    assert sizes == [5, 5, 2]
    torch.testing.assert_close(loss, expected.detach())
    assert_same(network, alone)


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm(training: bool) -> None:
    """Named once where chunks matter; its running statistics are those of one pass."""

    def network() -> nn.Sequential:
        torch.manual_seed(0)
        layers = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        return nn.Sequential(*layers).train(training)

    ours, theirs, criterion = network(), network(), PerceptionCoherenceLoss()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            cached_backward(ours, X, criterion, TEACHER, 4)
            criterion(by_chunks(theirs, X, 4), TEACHER).backward()
        alone = network()
        cached_backward(alone, X, criterion, TEACHER, N)
    messages = [str(one.message) for one in caught if "batch norm" in str(one.message)]
    assert len(messages) == int(training)
    assert all(text.startswith("student: batch norm '1' (BatchNorm1d)") for text in messages)
    assert_same(ours, theirs)
    for found, expected in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(found, expected)
    assert int(ours[1].num_batches_tracked) == (6 if training else 0)


class Replaced(nn.Module):
    """Depends on a buffer that every forward pass replaces by another tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("step", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.step = self.step + 1.0
        return x * self.step


@pytest.mark.parametrize("kind", ["in place", "replaced"])
def test_buffers_that_embeddings_depend_on(kind: str) -> None:
    def network() -> nn.Module:
        torch.manual_seed(0)
        linear = nn.Linear(6, 3)
        if kind == "in place":
            return nn.utils.parametrizations.spectral_norm(linear)
        return nn.Sequential(linear, Replaced())

    ours, theirs, criterion = network(), network(), PerceptionCoherenceLoss()
    for _ in range(2):
        cached_backward(ours, X, criterion, TEACHER, 4)
        criterion(by_chunks(theirs, X, 4), TEACHER).backward()
        for found, expected in zip(ours.buffers(), theirs.buffers(), strict=True):
            torch.testing.assert_close(found, expected)
    assert_same(ours, theirs)


def test_a_student_that_changes_its_inputs() -> None:
    network, alone, criterion = Network(), Network(), PerceptionCoherenceLoss()
    x = X.clone()
    cached_backward(lambda part: network(part.mul_(2)), x, criterion, TEACHER, 5)
    criterion(alone(2 * X), TEACHER).backward()
    assert_same(network, alone)
    assert torch.equal(x, X)


def test_gradients_of_inputs() -> None:
    ours, theirs = X.clone().requires_grad_(), X.clone().requires_grad_()
    network, criterion = Network(), PerceptionCoherenceLoss()
    cached_backward(network, ours, criterion, TEACHER, 5)
    criterion(network(theirs), TEACHER).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_embeddings_do_not_keep_all_that_they_are_a_view_of() -> None:
    hidden = torch.zeros(4, 100, 3)
    (found,) = cached.CachedPass("student", [lambda: hidden[:, 0]], [], []).embeddings()
    assert found.untyped_storage().nbytes() == 4 * 3 * 4


def test_no_points() -> None:
    network, criterion = Network(), PerceptionCoherenceLoss()
    assert cached_backward(network, X[:0], criterion, TEACHER[:0], 5) == 0
    assert not gradient(network).any()


class Owner:
    """Holds a network without being one."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def embed(self, x: Tensor) -> Tensor:
        return self.network(x)

    __call__ = embed


GLOBAL = nn.Linear(1, 1)


def test_modules_are_found_in_callables() -> None:
    network = Network()

    def unassigned() -> Any:
        return network, later

    for function in (
        network,
        network.forward,
        lambda x: network(x),
        functools.partial(lambda n, x: n(x), network),
        functools.partial(network, mode="tanh"),
        Owner(network),
        Owner(network).embed,
        unassigned,
    ):
        assert cached.modules_of(function) == [network]
    later = None
    assert cached.modules_of(unassigned) == [network]
    assert cached.modules_of(lambda x: GLOBAL(x)) == [GLOBAL]
    assert cached.modules_of(torch.relu) == []


def made(x: Tensor) -> Tensor:
    return x.clone().requires_grad_() * 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"chunk": 0}, ValueError, "chunk: expected an int of at least 1; got 0"),
        ({"chunk": 2.0}, TypeError, "chunk: expected an int of at least 1; got 2.0"),
        ({"factor": 0.0}, ValueError, "factor: expected a finite number above 0; got 0.0"),
        ({"scaler": 8.0}, TypeError, "scaler: expected a torch.amp.GradScaler or None; got float"),
        ({"student": X}, TypeError, "student: expected a callable; got Tensor"),
        ({"criterion": "mse"}, TypeError, "criterion: expected a callable; got str"),
        (
            {"criterion": PerceptionCoherenceLoss(reduction="none")},
            ValueError,
            "criterion: expected one whose loss is a single number, .*; got reduction 'none'",
        ),
        ({"inputs": 3}, TypeError, "inputs: expected a tensor, a tuple .*; got int"),
        ({"inputs": []}, ValueError, "inputs: expected a tensor with a row for each .*; got none"),
        ({"inputs": SCALE}, ValueError, "inputs: expected a tensor with a row .*; got none"),
        (
            {"inputs": {"values": X, "mask": MASK[:5]}},
            ValueError,
            r"inputs\['mask'\]: expected as many rows as inputs\['values'\], 12; got 5",
        ),
        ({"inputs": (X, X[1:])}, ValueError, r"inputs\[1\]: expected as many rows as .*; got 11"),
        ({"inputs": (X, [X])}, TypeError, r"inputs\[1\]: expected a tensor, .* a list of tensors"),
        (
            {"inputs": (X, {"mask": MASK})},
            TypeError,
            r"inputs\[1\]: expected a tensor, .* a dict of tensors",
        ),
        ({"inputs": made(X)}, ValueError, "inputs: expected a tensor without a graph, .*detach"),
        ({"teacher": None}, TypeError, "teacher: expected a tensor .* or a callable; got NoneType"),
        (
            {"teacher": TEACHER[1:]},
            ValueError,
            "teacher: expected as many rows as inputs, 12; got",
        ),
    ],
)
def test_refused_before_any_work(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    calls = []
    network = Network()
    network.register_forward_pre_hook(lambda *given: calls.append(given))
    given = {
        "student": network,
        "inputs": X,
        "criterion": PerceptionCoherenceLoss(),
        "teacher": TEACHER,
        "chunk": 5,
    }
    with pytest.raises(error, match=f"^{message}"):
        cached_backward(**(given | arguments))
    assert not calls


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_gradients_must_be_enabled(context: Callable[[], Any]) -> None:
    with context(), pytest.raises(RuntimeError, match=r"^cached_backward: expected .*no_grad"):
        cached_backward(Network(), X, PerceptionCoherenceLoss(), TEACHER, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"student": lambda x: (x,)}, TypeError, "student: expected it to return .*; got tuple"),
        (
            {"student": lambda x: x.mean(0)},
            ValueError,
            r"student: expected it to return an embedding for each of 5 points; got shape \(6,\)",
        ),
        ({"teacher": lambda x: x[1:]}, ValueError, "teacher: expected it to return .* 5 points"),
        ({"student": lambda x: x * 2}, ValueError, "student: expected embeddings with a gradient"),
        ({"criterion": lambda s, t: 0.0}, TypeError, "criterion: .* a tensor; got float"),
        (
            {"criterion": lambda s, t: s.square().mean(1)},
            ValueError,
            r"criterion: .* a 0-d tensor; got shape \(12,\)",
        ),
        (
            {"criterion": lambda s, t: t.sum()},
            ValueError,
            "criterion: expected a loss of the embeddings; got one without gradient",
        ),
        (
            {"criterion": lambda s, t: GLOBAL.weight.sum()},
            ValueError,
            "criterion: expected a loss of the embeddings; got one without them",
        ),
    ],
)
def test_what_callables_return(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = {"student": Network(), "criterion": PerceptionCoherenceLoss(), "teacher": TEACHER}
    with pytest.raises(error, match=f"^{message}"):
        cached_backward(**(given | arguments), inputs=X, chunk=5)


SHARDS = [(0, 7), (7, N)]
"""Three chunks of 3 points, and two."""


def parallel_training(rank: int) -> None:
    """Uneven shards, gathered: what one process does, with one synchronisation each step."""
    own = slice(*SHARDS[rank])
    reductions = []

    def count(state, bucket):  # annotations as strings are refused
        reductions.append(bucket.is_last())
        work = dist.all_reduce(bucket.buffer(), async_op=True)
        return work.get_future().then(lambda done: done.value()[0] / dist.get_world_size())

    alone, criterion = Network(), PerceptionCoherenceLoss()
    wrapped = DistributedDataParallel(Network())
    wrapped.register_comm_hook(None, count)
    gathering = PerceptionCoherenceLoss(gather=True, bank=CandidateBank(20))
    criterion = PerceptionCoherenceLoss(bank=CandidateBank(20))
    for step in range(2):
        for network in (alone, wrapped):
            network.zero_grad()
        x = X + step
        cached_backward(lambda part: wrapped(part), x[own], gathering, TEACHER[own], 3)
        criterion(alone(x), TEACHER).backward()
        assert_same(wrapped.module, alone)
        assert sum(reductions) == step + 1
    with wrapped.no_sync():
        cached_backward(wrapped, x[own], gathering, TEACHER[own], 3)
    assert sum(reductions) == 2


def parallel_buffers(rank: int) -> None:
    """Process 0's, in both passes."""
    network = nn.Sequential(nn.Linear(6, 3), Replaced())
    wrapped = DistributedDataParallel(network)
    network[1].step.fill_(float(rank))
    seen: list[Tensor] = []
    wrapped.register_forward_hook(lambda m, i, found: seen.append(found.detach()))
    own = slice(*SHARDS[rank])
    for _ in range(2):
        seen.clear()
        cached_backward(wrapped, X[own], PerceptionCoherenceLoss(gather=True), TEACHER[own], 3)
        half = len(seen) // 2
        assert half == [3, 2][rank]
        assert all(torch.equal(*pair) for pair in zip(seen[:half], seen[half:], strict=True))


def refused(rank: int) -> None:
    fixed = DistributedDataParallel(Network(), static_graph=True)
    with pytest.raises(ValueError, match=r"^student: expected .* without static_graph=True"):
        cached_backward(fixed, X, PerceptionCoherenceLoss(), TEACHER, 3)


class Texts(nn.Module):
    """Returns what a SentenceTransformer does."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Network()

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": self.network(features["values"])}


def adapter(rank: int) -> None:
    """The second pass runs inside of the trainer's backward pass."""
    own, alone = slice(*SHARDS[rank]), Network()
    wrapped = DistributedDataParallel(Texts())
    criterion = CachedCoherenceDistillationLoss(wrapped, mini_batch_size=3, gather=True)
    for _ in range(2):
        wrapped.zero_grad()
        criterion([{"values": X[own]}], TEACHER[own]).backward()
    PerceptionCoherenceLoss()(alone(X), TEACHER).backward()
    assert_same(wrapped.module, alone)


def fully_sharded(rank: int) -> None:
    """As many chunks in every process."""
    own, network, alone = slice(6 * rank, 6 * rank + 6), Network(), Network()
    fully_shard(network, mesh=init_device_mesh("cpu", (2,)))
    cached_backward(network, X[own], PerceptionCoherenceLoss(gather=True), TEACHER[own], 4)
    PerceptionCoherenceLoss()(alone(X), TEACHER).backward()
    for found, expected in zip(network.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(found.grad.full_tensor(), expected.grad, rtol=1e-5, atol=1e-6)


def work(rank: int, size: int) -> None:
    """What one process does."""
    parallel_training(rank)
    parallel_buffers(rank)
    adapter(rank)
    fully_sharded(rank)
    refused(rank)


def test_two_processes(tmp_path: Path) -> None:
    run_in_processes(__file__, 2, tmp_path)


if __name__ == "__main__":
    join_group(work, held=True)
