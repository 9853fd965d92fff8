"""The one way from parameters to Hugging Face tensors: conversion, export and weight sync iterate over it."""

from collections.abc import Iterable, Iterator

from torch import Tensor

from megatron_troll.weights.table import Place, Tensors


def tensors_of(parameters: Iterable[tuple[Place, Tensors]]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every Hugging Face tensor that `parameters` (each as its full parts) hold, in their
    order. One parameter is in memory at a time; a tensor may share memory with it: copy what is kept."""
    for place, parts in parameters:
        yield from zip(place.names, place.entry.from_parts(parts), strict=True)
