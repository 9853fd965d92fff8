"""Trains, exports and generates with the tiny model of a family on the ranks of one layout."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_troll.batching.build import Form
from megatron_troll.batching.build import build as build_batch
from megatron_troll.config import Layout, Model
from megatron_troll.mcore.decode import Decoder, generation_mode
from megatron_troll.mcore.head import Head
from megatron_troll.mcore.model import MegatronModel, build
from megatron_troll.mcore.optimizer import trainable
from megatron_troll.mcore.schedule import accumulate
from megatron_troll.mcore.shape import read_shape
from megatron_troll.types import HeadRequest, MicroBatch
from megatron_troll.weights.export import stream
from megatron_troll.weights.families import table_of
from megatron_troll.weights.load import load
from megatron_troll.weights.source import FolderSource
from tests.dist.layout_table import Sizes, formed_groups
from tests.dist.layouts_batch import OPTIMIZER, Weights
from tests.dist.layouts_worker import gradients_of
from tests.dist.plan_worker import response
from tests.dist.test_weights import Logits, fill_with_nan, read_logits
from tests.dist.tiny import started

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
    """Those of `loss_at`'s, from packed sequences in two micro-batches."""
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
    """This data-parallel rank's sequences, of which `sequences_of` tells the lengths."""
    groups = model.groups
    form = Form(model.shape.vocab, cp_rank=groups.cp.rank, cp_size=groups.cp.size, tp_size=groups.tp.size)
    rollouts = [response(sequence.numpy()) for sequence in sequences_of(tokens)]
    weights = [weight_of(row) for row in range(len(rollouts))]
    mine = range(groups.dp.rank, len(rollouts), groups.dp.size)
    return [build_batch(rollouts, weights, weights, chosen, form) for chosen in (mine[::2], mine[1::2])]


def sequences_of(tokens: Tensor) -> list[Tensor]:
    """The rows of `tokens`, each three tokens shorter than the one before."""
    return [row[: len(row) - 3 * i] for i, row in enumerate(tokens)]


def weight_of(row: int) -> float:
    return (row + 1) / 50


def loss_at(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    """-sum of weight x log-prob over the tokens of all sequences, each after its own first token, by Hugging
    Face's model."""
    total = torch.zeros(())
    for row, sequence in enumerate(sequences_of(tokens)):
        read = torch.cat([sequence[:1], sequence[:-1]])
        logp = model(read[None]).logits[0].log_softmax(-1).gather(1, sequence[:, None])
        total = total - weight_of(row) * logp.sum()
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
