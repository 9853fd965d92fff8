"""PPO-clip of other libraries, for bench_head.py: each computes the same loss from hidden states [N, h]."""

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from bench_case import Case, Shape, Variant, Work
from bench_methods import clip
from torch import Tensor

EPS = 0.2
NegativeLogProb = Callable[[Tensor, Tensor, Tensor], Tensor]  # of hidden [N, h], weight [V, h], target [N]

# Matrix products for logits, dH and dW; logits are written and read, their gradients written and read twice.
KEPT = Work(3, 5, 0)
MADE_AGAIN = Work(4, 5, 0)


def baselines() -> list[Variant]:
    """All baselines, `dense/pytorch` first."""
    return [
        _of_log_probs("dense/pytorch", KEPT, _pytorch),
        _of_log_probs("megatron/vocab_parallel_cross_entropy", KEPT, _megatron),
        _of_log_probs("megatron/fused_vocab_parallel_cross_entropy", KEPT, _megatron_fused, _only_bf16),
        _of_log_probs("liger/fused_linear_scaled_cross_entropy", MADE_AGAIN, _liger, _liger_missing),
        Variant("liger/triton_grpo_loss", clip(), KEPT, _liger_grpo, _triton_missing, clips=True),
    ]


def _of_log_probs(
    name: str,
    work: Work,
    negative_logp: NegativeLogProb,
    missing: Callable[[str, torch.dtype], str | None] = lambda device, dtype: None,
) -> Variant:
    def prepare(case: Case, shape: Shape) -> Callable[[], Tensor]:
        old = _old_logp(case)

        def forward() -> Tensor:
            ratio = (-negative_logp(case.hidden, case.weight, case.target) - old).exp()
            limited = ratio.clamp(1 - EPS, 1 + EPS)
            return -torch.minimum(ratio * case.advantage, limited * case.advantage).mean()

        return forward

    return Variant(name, clip(), work, prepare, missing, clips=True)


@torch.no_grad()
def _old_logp(case: Case) -> Tensor:
    parts = zip(case.old.split(256), case.target.split(256))
    return -torch.cat([_pytorch(hidden, case.weight, target) for hidden, target in parts])


def _pytorch(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Autograd on whole rows of logits, as in a trainer without a fused head."""
    logits = F.linear(hidden, weight)
    rows = logits if logits.dtype == torch.float64 else logits.float()
    return -rows.log_softmax(1).gather(1, target[:, None])[:, 0]


def _megatron(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    return vocab_parallel_cross_entropy(F.linear(hidden, weight)[:, None], target[:, None])[:, 0]


def _megatron_fused(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from megatron.core import parallel_state
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    group = parallel_state.get_tensor_model_parallel_group()
    return fused_vocab_parallel_cross_entropy(F.linear(hidden, weight)[:, None], target[:, None], group)[:, 0]


def _only_bf16(device: str, dtype: torch.dtype) -> str | None:
    return None if dtype == torch.bfloat16 else "rounds its gradient to bf16"


def _liger(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Liger's own kernel on an H100 or H200, its chunked PyTorch code on other devices."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    return LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, target)


def _liger_missing(device: str, dtype: torch.dtype) -> str | None:
    if not _importable("liger_kernel"):
        return "liger-kernel is not installed (megatron-troll[dev])"
    sm90 = device == "cuda" and torch.cuda.get_device_capability() == (9, 0)
    return (
        "nvidia-cutlass-dsl is not installed (liger-kernel[cutedsl])"
        if sm90 and not _importable("cutlass")
        else None
    )


def _liger_grpo(case: Case, shape: Shape) -> Callable[[], Tensor]:
    """Liger's GRPO loss on logits that are kept for backward; it needs one extra row per answer."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    answers = (-1, shape.answer)
    old, target = _old_logp(case).view(answers), case.target.view(answers)
    advantage = case.advantage.view(answers)[:, 0].contiguous()

    def forward() -> Tensor:
        hidden = F.pad(case.hidden.view(*target.shape, -1), (0, 0, 0, 1))
        logits = F.linear(hidden, case.weight)
        losses = triton_grpo_loss(
            logits, old, None, target, advantage, temperature=1.0, beta=0.0, eps_low=EPS, eps_high=EPS
        )
        return losses[0].mean()

    return forward


def _triton_missing(device: str, dtype: torch.dtype) -> str | None:
    if device != "cuda":
        return "a Triton kernel: needs a GPU"
    return None if _importable("liger_kernel") else "liger-kernel is not installed (megatron-troll[dev])"


def _importable(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
