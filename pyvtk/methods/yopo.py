"""YOPO: visual tokens see their neighbours only, few heads look at visual tokens, and late layers have none.

Source: Treat Visual Tokens as Text? But Your MLLM Only Needs Fewer Efforts to See (arXiv 2410.06169),
    github.com/ZhangAIPI/YOPO_MLLM_Pruning
Acts: in the attention of every decoder layer; visual tokens leave before the cut layer (20 of 40, 24 of 28)
Needs: a TokenLayout; for the heads, queries and keys of every layer over a calibration set

- Neighbours (``plan``): visual tokens of one image see each other within a radius (2 is the code's width 5), clipped at
  the border, in both directions; all other pairs are causal. The paper's figure draws a causal band instead
  (``causal_window=True``).
- Heads (``visual_mass``, ``active_heads``): with A the map of the unmodified causal model,

      rho_h = sum over queries of the mass on visual keys / sum over queries of the mass on all other keys

  A head is active if rho_h > threshold in more than 0.4 of the samples; layers 0 and 1 stay whole. A head that is not
  loses the weights of visual columns after the softmax and is not renormalised, and LLaVA's code zeroes its output in
  visual rows: ``neighbor_attention(..., visual_heads=active[layer], visual_mass="keep", visual_rows="zero")``.
- Cut (``drop_visual``): the released code zeroes columns instead, a simulation; its text and figure say that visual
  tokens leave. Survivors keep their original positions.

Not covered: the FFN of visual rows by the first I / m channels (two products, no operator), and the Qwen2-VL patch,
which masks before the softmax. Qwen2-VL and InternVL measure rho by the first decode row alone: pass that row. Window,
ratio and votes follow notes on the released code; nothing was compared with a run of it. ``share`` of ``active_heads``
is ours.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import pyvtk


def plan(
    layout: pyvtk.TokenLayout,
    radius: int | tuple[int, int, int] = 2,
    *,
    causal_window: bool = False,
    cross_image: bool = False,
) -> pyvtk.AttentionPlan:
    """The plan for :func:`pyvtk.neighbor_attention` that all layers share; as :func:`pyvtk.neighbor_plan`.

    Args:
        layout: of the tokens.
        radius: (width - 1) / 2 of the paper; one for all axes or (t, y, x).
        causal_window: visual tokens see only earlier neighbours.
        cross_image: visual tokens see earlier images too; published code has one image.
    """
    return pyvtk.neighbor_plan(layout, radius, causal_window=causal_window, cross_image=cross_image)


def visual_mass(
    q: Tensor,
    k: Tensor,
    visual: Tensor,
    *,
    valid: Tensor | None = None,
    q_positions: Tensor | None = None,
    q_mask: Tensor | None = None,
) -> Tensor:
    """rho of every head, from column sums; the map is never built. Not normalised by lengths.

    Args:
        q: [batch, query heads, rows, dim], rotated queries: all rows of a prefill, or the last ones.
        k: [batch, key heads, tokens, dim], rotated keys.
        visual, valid: see :mod:`pyvtk.methods`.
        q_positions: int [batch, rows], the place of each row among the tokens; None: the last rows.
        q_mask: bool [batch, rows], False for rows that do not exist; None: those of valid tokens, with q_positions all.

    Returns:
        [batch, query heads], float32 (float64 for float64); inf where only visual keys have mass, NaN where none has.

    Raises:
        What :func:`pyvtk.attention_scores` raises.
    """
    if q_mask is None and q_positions is None and valid is not None:
        q_mask = valid[:, k.shape[2] - q.shape[2] :]
    scores = pyvtk.attention_scores(
        q, k, causal=True, q_positions=q_positions, q_mask=q_mask, k_mask=valid, query_reduce="sum", head_reduce=None
    )
    seen = visual[:, None]
    return scores.masked_fill(~seen, 0).sum(-1) / scores.masked_fill(seen, 0).sum(-1)


def active_heads(
    mass: Tensor,
    threshold: float | None = None,
    *,
    share: float | None = None,
    votes: float = 0.4,
    whole_layers: int = 2,
) -> Tensor:
    """Heads that look at visual tokens.

    Args:
        mass: rho, [samples, layers, heads], or [layers, heads] of one sample. NaN counts as no mass.
        threshold: a head is active if rho > threshold in more than ``votes`` of the samples.
        share: instead, the threshold is set so that round(share * heads) are active, of the layers behind whole_layers.
        votes: 0 to 1 (exclusive).
        whole_layers: so many first layers keep all heads.

    Returns:
        bool [layers, heads].

    Raises:
        ValueError: not exactly one of threshold and share is given; votes out of range; mass of another shape.
    """
    if (threshold is None) == (share is None):
        raise ValueError(
            f"yopo.active_heads: one of threshold and share must be given, got threshold={threshold}, share={share}"
        )
    if not 0 <= votes < 1:
        raise ValueError(f"yopo.active_heads: votes must be in 0..1 (exclusive), got {votes}")
    mass = mass[None] if mass.dim() == 2 else mass
    if mass.dim() != 3 or mass.shape[0] == 0:
        raise ValueError(
            f"yopo.active_heads: mass must be [samples, layers, heads] or [layers, heads], got {tuple(mass.shape)}"
        )
    # more than n samples are above a threshold exactly if the (n + 1)-th largest is
    ranked = mass.nan_to_num(-math.inf, math.inf, -math.inf).sort(0, descending=True).values
    deciding = ranked[int(votes * mass.shape[0])]
    whole = (torch.arange(deciding.shape[0], device=mass.device) < whole_layers)[:, None]
    if threshold is not None:
        return whole | (deciding > threshold)
    late = max(deciding.shape[0] - whole_layers, 0) * deciding.shape[1]
    others = ~whole.expand(deciding.shape).reshape(1, -1)
    best = pyvtk.select(deciding.reshape(1, -1), round(share * late), candidates=others)
    return whole | best.mask().view(deciding.shape)


def drop_visual(
    visual: Tensor, *, valid: Tensor | None = None, capacity: int | None = None, align: str = "left"
) -> pyvtk.Selection:
    """The text tokens, which alone go on from the cut layer; arguments as in :mod:`pyvtk.methods`.

    Where there are more than capacity holds, the first are kept.
    """
    text = ~visual if valid is None else ~visual & valid
    return pyvtk.Selection.from_mask(text, capacity=capacity, align=align)
