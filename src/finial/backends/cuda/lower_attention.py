"""Launches of attention: fused with what prepares it, single rows, or tiles of many rows.

Knows which kernel takes which rows; see `lower.py` for the whole.
"""

from __future__ import annotations

from finial.backends.cuda import kernels
from finial.backends.cuda.lower_values import Values, number, width_of, window
from finial.backends.cuda.plan import Attention
from finial.backends.cuda.workspace import Place
from finial.graph import Node


class AttentionLowering(Values):
    """See `finial.backends.cuda.lower.Lowering`."""

    def _attention(self, node: Node) -> None:
        q, out = self.places[node.inputs[0]], self._make(node.outputs[0])
        self._attend(node, out, fused=False, normed=False, q=q.address, q_stride=q.stride)

    def _fused_attention(self, item: Attention) -> None:
        node = item.node
        state, head_dim, heads = self._cache(item.write.inputs[0])
        q, k, v = (self.places[name] for name in (item.q, item.k, item.v))
        assert k.stride == v.stride
        args: dict[str, float] = {
            "q": q.address,
            "k": k.address,
            "v": v.address,
            "frequencies": self._model.vector((item.rope.inputs[2],)),
            "slots": self._ints[item.write.inputs[3]],
            "q_stride": q.stride,
            "kv_stride": k.stride,
            "rope_scale": number(item.rope, "scale"),
        }
        if item.norms is not None:
            args["q_norm"], args["k_norm"] = (self._model.vector((norm.inputs[1],)) for norm in item.norms)
            args["eps"] = number(item.norms[0], "eps")
        name = node.outputs[0]
        out = self._make_half(name) if name in self._half else self._make(name)
        if self._decode:
            self._attend(node, out, fused=True, normed=item.norms is not None, **args)
            return
        rows, width = self._count(self._graph.values[name]), width_of(self._graph.values[name])
        group = width // (heads * head_dim)
        flash = self._rows.get("tiles", 0) > 0 and kernels.has_flash(state.dtype, head_dim, group)
        ready = self._workspace.take(rows * width * (2 if flash else 4))
        self._launch(
            kernels.prepare_rows(
                state.dtype, head_dim=head_dim, heads=heads, group=group, normed=item.norms is not None, half=flash
            ),
            (rows, heads * (group + 2), 1),
            cache=self._caches[state.name],
            positions=self._ints[node.inputs[2]],
            out=ready.address,
            out_stride=width,
            scale=number(node, "scale"),
            **args,
        )
        if flash:
            self._flash(node, ready.address, out)
        else:
            self._attend(node, out, fused=False, normed=False, q=ready.address, q_stride=width)
        self._workspace.give(ready)

    def _flash(self, node: Node, queries: int, out: Place) -> None:
        state, head_dim, heads = self._cache(node.inputs[1])
        width = width_of(self._graph.values[node.outputs[0]])
        kernel = kernels.flash(
            state.dtype,
            head_dim=head_dim,
            heads=heads,
            group=width // (heads * head_dim),
            page_size=self._page_size,
            window=window(node),
            half=out.half,
        )
        self._launch(
            kernel,
            (self._rows["tiles"], heads, 1),
            q=queries,
            cache=self._caches[state.name],
            tiles=self._ints["tiles"],
            pages=self._ints[node.inputs[5]],
            out=out.address,
            q_stride=width,
            out_stride=out.stride,
            page_stride=self._page_stride,
        )

    def _attend(self, node: Node, out: Place, *, fused: bool, normed: bool, **args: float) -> None:
        state, head_dim, heads = self._cache(node.inputs[1])
        value = self._graph.values[node.outputs[0]]
        rows, group = self._count(value), width_of(value) // (heads * head_dim)
        parts = heads * -(-group // kernels.heads_at_once(state.dtype, group))
        splits = min(32, max(1, 2 * self._device.multiprocessors // (rows * parts)))
        self._launch(
            kernels.attend(
                state.dtype,
                head_dim=head_dim,
                heads=heads,
                group=group,
                splits=splits,
                page_size=self._page_size,
                window=window(node),
                fused=fused,
                normed=normed,
                half=out.half,
            ),
            (splits, parts, rows),
            **{"slots": 0, **args},
            cache=self._caches[state.name],
            positions=self._ints[node.inputs[2]],
            sequence=self._ints["sequence"],
            pages=self._ints[node.inputs[5]],
            out=out.address,
            parts=self._once("parts", rows * heads * group * splits * (head_dim + 2) * 4) if splits > 1 else 0,
            tickets=self._once("tickets", rows * parts * 4),
            out_stride=out.stride,
            page_stride=self._page_stride,
            scale=number(node, "scale"),
        )
