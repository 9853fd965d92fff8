"""Trains on shared prompts, exports and generates with the tiny model of a family on the ranks of one
layout."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_troll.batching.build import Form
from megatron_troll.batching.build import build as build_batch
from megatron_troll.batching.prefixes import shared_prefixes
from megatron_troll.config import Layout, Model
from megatron_troll.mcore.decode import Decoder, generation_mode
from megatron_troll.mcore.head import Head
from megatron_troll.mcore.model import MegatronModel, build
from megatron_troll.mcore.optimizer import trainable
from megatron_troll.mcore.schedule import accumulate
from megatron_troll.mcore.shape import read_shape
from megatron_troll.types import HeadRequest, MicroBatch, Rollout
from megatron_troll.weights.export import stream
from megatron_troll.weights.families import table_of
from megatron_troll.weights.load import load
from megatron_troll.weights.source import FolderSource
from tests.dist.layout_table import Sizes, formed_groups
from tests.dist.layouts_batch import OPTIMIZER, Weights
from tests.dist.layouts_worker import gradients_of
from tests.dist.test_weights import Logits, fill_with_nan, read_logits
from tests.dist.tiny import started
from tests.unit.batching.samples import rollout

GENERATED = 8


@dataclass(frozen=True)
class Result:
    """One rank's groups; the tensors that did not come back bit-equal; its share of the logits; the gradients
    of all tensors and their norm; the tokens [B, GENERATED] after each prompt, by their logits; the tensors
    that an optimizer step left as they were."""

    groups: Sizes
    differing: list[str]
    logits: Logits
    gradients: Weights
    grad_norm: float
    generated: Tensor
    kept: set[str]


def run_families(sizes: Sizes, folders: dict[str, str], tokens: Tensor) -> dict[str, Result]:
    return {name: run(sizes, folder, tokens) for name, folder in folders.items()}


def run(sizes: Sizes, folder: str, tokens: Tensor) -> Result:
    layout = Layout(**sizes)
    config = Model(path=folder, dtype="fp32", layout=layout, optimizer=OPTIMIZER)
    with started(layout) as groups:
        model = build(config, read_shape(folder), groups)
        fill_with_nan(model)
        source = FolderSource(folder)
        load(model, source)
        exported = {name: tensor.clone() for name, tensor in stream(model)}
        carried = table_of(model.shape).carried
        own = [name for name in source.shapes if not name.startswith(carried)]
        differing = [name for name in own if not torch.equal(exported[name], source.read(name))]
        differing += exported.keys() - set(own)
        logits = read_logits(model, tokens)
        generated = generate(model, tokens) if groups.cp.size == 1 else torch.empty(0)
        policy = trainable(model, config.optimizer, total_steps=1)
        gradients = gradients_at(model, tokens)
        grad_norm = policy.step()
        kept = {name for name, tensor in stream(model) if torch.equal(tensor, exported[name])}
        return Result(formed_groups(groups), differing, logits, gradients, grad_norm, generated, kept)


def gradients_at(model: MegatronModel, tokens: Tensor) -> Weights:
    """Those of `loss_at`, from packed episodes that share their beginnings."""
    head = Head(model)
    batches = packed(model, tokens)

    def loss(i: int, hidden: Tensor) -> tuple[Tensor, None]:
        logp = head.read(hidden, batches[i].target, HeadRequest(logp=True)).logp
        assert logp is not None
        return -(batches[i].weight * logp).sum(), None

    model.train()
    accumulate(model, batches, loss)
    return gradients_of(model)


def packed(model: MegatronModel, tokens: Tensor) -> list[MicroBatch]:
    """This data-parallel rank's part of the episodes, in two micro-batches."""
    groups, rollouts = model.groups, episodes_of(tokens)
    form = Form.of(groups, model.shape.vocab, shared=True)
    prefixes, weights = shared_prefixes(rollouts), [weight_of(i) for i in range(len(rollouts))]
    halves = ((0, 1, 2, 3), (6,)), ((4, 5), (7,))
    mine = halves[groups.dp.rank] if groups.dp.size == 2 else [(*first, *second) for first, second in halves]
    return [build_batch(rollouts, weights, weights, chosen, form, prefixes) for chosen in mine]


def sequences_of(tokens: Tensor) -> list[Tensor]:
    """The rows of `tokens`, each three tokens shorter than the one before."""
    return [row[: len(row) - 3 * i] for i, row in enumerate(tokens)]


def episodes_of(tokens: Tensor) -> list[Rollout]:
    """Samples of two groups, which share their beginnings, and two that share nothing. The first group has a
    tool's answer of four tokens after a turn of three; three of the four have the turn, two the answer."""
    row, mask = tokens.tolist(), [1, 1, 1, 0, 0, 0, 0, *[1] * 10]
    return [
        rollout(row[0][:7], row[0][7:]),
        *(rollout(row[0][:7], [*row[2][7:14], *row[i][14:]], mask) for i in (2, 1)),
        rollout(row[0][:7], [*row[2][7:10], *row[3][10:18]], mask[:11]),
        *(replace(rollout(row[3][:5], row[i][5:end]), group=1) for i, end in ((2, 16), (0, 14))),
        *(replace(rollout(row[i][:1], row[i][1:end]), group=i) for i, end in ((2, 18), (3, 15))),
    ]


def weight_of(sample: int) -> float:
    return (8 - sample) / 50


def loss_at(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    """-sum of weight x log-prob over the tokens of all episodes that are no tool's, by Hugging Face's model,
    which reads each of them whole and alone."""
    total = torch.zeros(())
    for i, episode in enumerate(episodes_of(tokens)):
        ids = torch.tensor([*episode.prompt_ids, *episode.response_ids])
        logp = model(ids[None, :-1]).logits[0].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        mask = torch.from_numpy(episode.mask)
        total = total - weight_of(i) * (mask * logp[-len(mask) :]).sum()
    return total


def generate(model: MegatronModel, tokens: Tensor) -> Tensor:
    """The likeliest tokens [B, GENERATED] after the sequences."""
    pp, tp = model.groups.pp, model.groups.tp
    prompts = [sequence.numpy() for sequence in sequences_of(tokens)]
    found = []
    with generation_mode(model):
        decoder = Decoder(model, len(prompts), tokens.shape[1] + GENERATED)
        prefixes, _ = decoder.extend(prompts, torch.empty(0, dtype=torch.long))
        for prefix in prefixes:
            decoder.cache.add(prefix)
        last = [prefix.hidden for prefix in prefixes if prefix.hidden is not None]
        hidden = torch.stack(last) if last else None
        for _ in range(GENERATED):
            ids = torch.empty(len(tokens), dtype=torch.long)
            if hidden is not None:
                shards = tp.all_gather(Head(model).logits(hidden))
                ids = torch.cat(shards, -1)[:, : model.shape.vocab].argmax(-1)
            found.append(pp.broadcast(ids, pp.size - 1).clone())
            _, hidden = decoder.extend([], found[-1])
    return torch.stack(found, 1)
