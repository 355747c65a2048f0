"""What the last few tokens are, by lookup: hashed n-grams beside the token itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..protocol import Exchange
from .embeddings import TokenEmbedding
from .rows import lay_out, take

_FACTOR = 1_000_003  # of the polynomial; odd, so that no token is forgotten modulo a power of two
_MIX = 0x9E3779B1  # Knuth's multiplicative hash: high bits depend on all


class NGramEmbedding(TokenEmbedding):
    """A token's vector plus a map of the vectors of the n-grams that end with it, found by their hashes (the hash
    n-gram embeddings of the Byte Latent Transformer, arXiv:2412.09871, section 3.2.1).

        x_t = E[t] + W concat_n T_n[hash(t_{i-n+1} .. t_i) mod size]

    Ours: narrow tables and the map W, where the paper adds vectors of full width, and the first tokens of a sequence
    hash with what is missing.

    num_tokens, dim, std, scale, drop: see `TokenEmbedding`. orders: the n, each at least 2. size: rows of a table, a
    power of two. width: of a row. The state is the last max(orders) - 1 tokens, int64 (B, n), 0 for none and 1 + token.
    Raises ValueError for values outside these.
    """

    exchange: Exchange | None = None  # see `Mixer`

    def __init__(
        self,
        num_tokens: int,
        dim: int,
        *,
        orders: Sequence[int],
        size: int = 1 << 15,
        width: int = 32,
        std: float = 0.02,
        scale: float = 1.0,
        drop: float = 0.0,
    ) -> None:
        super().__init__(num_tokens, dim, std=std, scale=scale, drop=drop)
        self.orders = tuple(sorted(orders))
        if not self.orders or self.orders[0] < 2 or len(set(self.orders)) < len(self.orders):
            raise ValueError(f"orders={list(orders)} must be different numbers of at least 2")
        if size < 2 or size & (size - 1):
            raise ValueError(f"size={size} must be a power of two")
        if width < 1:
            raise ValueError(f"width={width} must be at least 1")
        self.size = size
        self.tables = nn.ModuleList(nn.Embedding(size, width) for _ in self.orders)
        self.map = nn.Linear(width * len(self.orders), dim, bias=False)
        for table in self.tables:
            nn.init.normal_(table.weight, std=0.1)  # type: ignore[arg-type]

    @property
    def history(self) -> int:
        """Tokens of the state."""
        return self.orders[-1] - 1

    def init_state(self, batch_size: int, *, device: torch.device | str | None = None) -> Tensor:
        """No token seen."""
        return torch.zeros(batch_size, self.history, dtype=torch.int64, device=device or self.weight.device)

    def read(
        self,
        tokens: Tensor,
        *,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, L, D) and the state after the tokens, None unless one was given; arguments as `Mixer.forward`."""
        x = super().forward(tokens)
        layout = lay_out(mask, cu_seqlens, tokens.shape[1])
        rows = layout.place(tokens) + 1
        before = self.init_state(rows.shape[0], device=tokens.device) if state is None else state
        if self.exchange is not None:
            following = None if state is None else self.exchange.last(rows, self.history, state)
            before = self.exchange.around(rows, self.history, initial=before)[:, : self.history]
        every = torch.cat((before, rows), 1)
        grams = self.map(torch.cat([t(h) for t, h in zip(self.tables, self._hashes(every, rows), strict=True)], -1))
        x = x + self.drop(layout.restore(grams.to(x.dtype)))
        if state is None:
            return x, None
        if self.exchange is not None:
            return x, following
        if layout.lengths is None:
            return x, every[:, every.shape[1] - self.history :]
        place = layout.lengths.unsqueeze(1) + torch.arange(self.history, device=tokens.device)
        return x, take(every, place)

    def forward(self, tokens: Tensor) -> Tensor:
        """`read` of whole rows."""
        return self.read(tokens)[0]

    def _hashes(self, every: Tensor, rows: Tensor) -> list[Tensor]:
        """Of the n-grams that end with each token of `rows`, for each order; every: the state's tokens, then those."""
        length, found = rows.shape[1], []
        value = torch.zeros_like(rows)
        for back in range(self.orders[-1]):
            first = self.history - back
            value = (value * _FACTOR + every[:, first : first + length]) & 0xFFFFFFFF
            if back + 1 in self.orders:
                found.append(((value * _MIX) & 0xFFFFFFFF) >> (33 - self.size.bit_length()))
        return found
