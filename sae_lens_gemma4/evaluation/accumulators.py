"""Reconstruction metrics over a stream of tokens, exact as if all tokens had been there at once.

Sums by document are kept, a handful of numbers for every token, and the activations of those tokens that a figure may
leave out: the worst by squared error and the largest by norm, as many as the largest top fraction of `max_tokens` needs
and more, because resamples reach deeper. So variance explained without them is exact and memory stays bounded. What the
median norm will be is known at the end only; where more tokens lie above a multiple of it than were kept, a second look
at the same activations completes the figure (`needs_second_pass`). Two accumulators add up with `+`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from sae_lens_gemma4.errors import ConfigError, DataError
from sae_lens_gemma4.evaluation.figures import Sums, top_count
from sae_lens_gemma4.evaluation.intervals import Sampling
from sae_lens_gemma4.evaluation.kept import TopRows
from sae_lens_gemma4.evaluation.metrics import ReconstructionMetrics
from sae_lens_gemma4.evaluation.reading import ActiveLatents, float64
from sae_lens_gemma4.evaluation.robust import NORM_MULTIPLES, TOP_FRACTIONS, VerdictRules
from sae_lens_gemma4.evaluation.snapshot import Snapshot
from sae_lens_gemma4.evaluation.summary import summarise
from sae_lens_gemma4.evaluation.sums import COLUMNS, KeyedSums, token_columns

_SLACK = 3
"""Resamples may leave out documents with many of the worst tokens and then need as many others."""
_MIN_KEPT = 4096


class ReconstructionAccumulator:
    """Streams activations and their reconstructions into `ReconstructionMetrics`.

    Args:
        d_in: width of the activations.
        max_tokens: the most tokens that this one, with all it is added to, will see: only then does each shard keep
            enough rows. Memory is about max_tokens · (112 B + 4 · max(top_fractions) · d_in · bytes of an activation)
            and 16 · d_in bytes a document.
        d_sae: number of latents, for L0, L1 and dead counts; None leaves those undefined.
        top_fractions: the shares of worst tokens to leave out.
        norm_multiples: leave out tokens with norms above so many times the median norm (the mean of the middle two).
        rules: the verdict's thresholds.
    """

    def __init__(
        self,
        d_in: int,
        *,
        max_tokens: int,
        d_sae: int | None = None,
        top_fractions: Sequence[float] = TOP_FRACTIONS,
        norm_multiples: Sequence[float] = NORM_MULTIPLES,
        rules: VerdictRules = VerdictRules(),
    ) -> None:
        if not all(0 < fraction < 1 for fraction in top_fractions) or not top_fractions:
            raise ConfigError(f"Top fractions must lie between 0 and 1, not {list(top_fractions)}.")
        if not all(multiple > 0 for multiple in norm_multiples):
            raise ConfigError(f"Multiples of the median norm must be positive, not {list(norm_multiples)}.")
        if d_in < 1 or max_tokens < 1:
            raise ConfigError(f"d_in and max_tokens must be at least 1, not {d_in} and {max_tokens}.")
        self.d_in, self.d_sae, self.max_tokens, self.rules = d_in, d_sae, max_tokens, rules
        self.top_fractions, self.norm_multiples = tuple(sorted(top_fractions)), tuple(sorted(norm_multiples))
        largest = top_count(self.top_fractions[-1], max_tokens)
        self._worst = TopRows(min(max_tokens, max(_SLACK * largest, _MIN_KEPT)), d_in)
        self._largest = TopRows(min(max_tokens, max(largest, _MIN_KEPT)), d_in)
        self._sums = KeyedSums(d_in)
        self._groups: dict[str, KeyedSums] = {}
        self._reference_d: torch.Tensor | None = None
        self._by_dimension = torch.zeros(2, d_in, dtype=torch.float64)  # Σ(x − reference)², Σ(x − x̂)²
        self._columns: list[torch.Tensor] = []
        self._documents: list[torch.Tensor] = []  # each token's place among the sums
        self._has_documents: bool | None = None
        self._fired_f = torch.zeros(d_sae or 0, dtype=torch.int64)
        self._first_fired_f = torch.full((d_sae or 0,), max_tokens, dtype=torch.int64)
        self._above: dict[float, tuple[torch.Tensor, torch.Tensor]] = {}  # by a second pass
        self._looking: dict[float, tuple[torch.Tensor, torch.Tensor]] = {}
        self._looked_at = 0

    @property
    def n_tokens(self) -> int:
        return sum(map(len, self._columns))

    @torch.no_grad()
    def update(
        self,
        x_td: torch.Tensor,
        x_hat_td: torch.Tensor,
        acts: torch.Tensor | ActiveLatents | None = None,
        *,
        documents_t: torch.Tensor | None = None,
        groups: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Add tokens.

        Args:
            x_td: activations `[t, d_in]`.
            x_hat_td: their reconstructions `[t, d_in]`.
            acts: latents, dense `[t, d_sae]` or `ActiveLatents`.
            documents_t: each token's document; with them figures get intervals. With all updates or with none.
            groups: by name (position, role, …) each token's group `[t]`, for `group_sums`.

        Raises:
            DataError: shapes that do not fit, values that are not finite, or more than `max_tokens` tokens.
        """
        n = len(x_td)
        self._check(x_td, x_hat_td, acts, {"document": documents_t, **(groups or {})})
        if n == 0:
            return
        x, x_hat = float64(x_td), float64(x_hat_td)
        device = x.device
        active = acts if acts is None or isinstance(acts, ActiveLatents) else ActiveLatents.of(acts)
        l0_t, l1_t = torch.zeros(2, n, dtype=torch.float64, device=device)
        if active is not None:
            l0_t = torch.bincount(active.token_a, minlength=n).to(device)
            l1_t.index_add_(0, active.token_a.to(device), active.value_a.to(device).double().abs())
        columns_tc = token_columns(x, x_hat, l0_t, l1_t)
        if not columns_tc.isfinite().all():
            raise DataError("Activations, reconstructions or latents are not finite.")
        if self._reference_d is None:
            self._reference_d = x.median(dim=0).values  # not where a few huge tokens would drag it
        self._above, self._looking, self._looked_at = {}, {}, 0  # there is another median now
        centred, error = x - self._reference_d.to(device), x - x_hat
        self._has_documents = documents_t is not None
        keys_t = torch.zeros(n, dtype=torch.long) if documents_t is None else documents_t.long()
        start = self.n_tokens
        self._documents.append(self._sums.add(keys_t, columns_tc, centred, error))
        for name, group_t in (groups or {}).items():
            self._groups.setdefault(name, KeyedSums(self.d_in)).add(group_t, columns_tc, centred, error)
        squares = torch.stack([centred.square().sum(0), error.square().sum(0)])
        self._by_dimension = self._by_dimension.to(device) + squares
        columns_tc = columns_tc.cpu()
        self._columns.append(columns_tc)
        index_t = torch.arange(start, start + n)
        self._worst.add(columns_tc[:, COLUMNS.index("sse")], index_t, x_td)
        self._largest.add(columns_tc[:, COLUMNS.index("norm")], index_t, x_td)
        if active is not None:
            latents = active.latent_a.cpu()
            self._fired_f += torch.bincount(latents, minlength=len(self._fired_f))
            self._first_fired_f.scatter_reduce_(0, latents, active.token_a.cpu() + start, "amin")

    def _check(
        self,
        x_td: torch.Tensor,
        x_hat_td: torch.Tensor,
        acts: torch.Tensor | ActiveLatents | None,
        labels: Mapping[str, torch.Tensor | None],
    ) -> None:
        if x_td.shape != x_hat_td.shape or x_td.ndim != 2 or x_td.shape[1] != self.d_in:
            raise DataError(
                f"Activations {tuple(x_td.shape)} and reconstructions {tuple(x_hat_td.shape)} "
                f"must both be [tokens, {self.d_in}]."
            )
        shape = tuple(acts.shape) if isinstance(acts, torch.Tensor) else None
        if (acts is None) != (self.d_sae is None) or (shape is not None and shape != (len(x_td), self.d_sae)):
            raise DataError(f"Latents have the shape {shape}, not ({len(x_td)}, {self.d_sae}).")
        if isinstance(acts, ActiveLatents):
            for name, index_a, size in (("token", acts.token_a, len(x_td)), ("latent", acts.latent_a, self.d_sae or 0)):
                if len(index_a) and not 0 <= int(index_a.min()) <= int(index_a.max()) < size:
                    raise DataError(f"Active latents name a {name} outside 0..{size - 1}.")
        for name, label_t in labels.items():
            if label_t is not None and label_t.shape != (len(x_td),):
                raise DataError(f"{name.capitalize()} numbers are {tuple(label_t.shape)}, not ({len(x_td)},).")
        if self._has_documents not in (None, labels["document"] is not None):
            raise DataError("Document numbers must come with all tokens or with none.")
        self._make_room(len(x_td))

    def _make_room(self, n: int) -> None:
        if self.n_tokens + n > self.max_tokens:
            raise DataError(f"{self.n_tokens + n} tokens are more than max_tokens={self.max_tokens}.")

    def __add__(self, other: ReconstructionAccumulator) -> ReconstructionAccumulator:
        """Both together, exactly; `self`'s tokens count as the earlier ones, equal document numbers as one document.

        Raises:
            ConfigError: they were not made alike.
            DataError: together they have seen more than `max_tokens`.
        """
        for name in ("d_in", "d_sae", "max_tokens", "top_fractions", "norm_multiples", "rules"):
            if getattr(self, name) != getattr(other, name):
                values = f"{getattr(self, name)} and {getattr(other, name)}"
                raise ConfigError(f"Accumulators can be added if made alike; {name} is {values}.")
        self._make_room(other.n_tokens)
        total = ReconstructionAccumulator(
            self.d_in,
            max_tokens=self.max_tokens,
            d_sae=self.d_sae,
            top_fractions=self.top_fractions,
            norm_multiples=self.norm_multiples,
            rules=self.rules,
        )
        for part in (self, other):
            total._take_in(part)
        return total

    def _take_in(self, part: ReconstructionAccumulator) -> None:
        if part._reference_d is None:
            return
        if self._has_documents not in (None, part._has_documents):
            raise ConfigError("Accumulators with documents and without cannot be added.")
        self._has_documents = part._has_documents
        if self._reference_d is None:
            self._reference_d = part._reference_d.cpu()
        shift_d = part._reference_d.cpu() - self._reference_d
        start = self.n_tokens
        squares = part._by_dimension.cpu().clone()
        squares[0] += 2 * part._sums.x.sum(0).cpu() * shift_d + part.n_tokens * shift_d.square()
        self._by_dimension = self._by_dimension + squares
        places = self._sums.merge(part._sums, shift_d)
        for name, sums in part._groups.items():
            self._groups.setdefault(name, KeyedSums(self.d_in)).merge(sums, shift_d)
        self._documents += [places[rows] for rows in part._documents]
        self._columns += part._columns
        self._worst, self._largest = self._worst.merged(part._worst, start), self._largest.merged(part._largest, start)
        self._fired_f += part._fired_f
        seen_f = part._fired_f > 0
        self._first_fired_f[seen_f] = self._first_fired_f[seen_f].minimum(part._first_fired_f[seen_f] + start)

    def tokens(self, *names: str) -> torch.Tensor:
        """Columns (`sums.COLUMNS`) of all tokens in the order in which they came, float64 `[n_tokens, len(names)]`."""
        return torch.cat(self._columns)[:, [COLUMNS.index(name) for name in names]]

    def needs_second_pass(self) -> tuple[float, ...]:
        """Multiples of the median norm above which more tokens lie than were kept."""
        return self.snapshot().not_kept() if self.n_tokens else ()

    @torch.no_grad()
    def second_pass(self, x_td: torch.Tensor) -> None:
        """Show the same activations again, all of them in the same order, to complete `needs_second_pass`.

        Raises:
            DataError: more tokens than there were, or others.
        """
        snapshot = self.snapshot()
        if self._looked_at == 0:
            like = snapshot.sums
            self._looking = {c: (torch.zeros_like(like.centred), torch.zeros_like(like.x)) for c in snapshot.not_kept()}
        seen = slice(self._looked_at, self._looked_at + len(x_td))
        norm_t, x = snapshot.column("norm")[seen], x_td.cpu().double()
        alike = x.shape == (len(norm_t), self.d_in)
        if not alike or not torch.allclose(x.norm(dim=1), norm_t, rtol=1e-3, atol=1e-6):
            raise DataError("The second pass shows other activations than the first.")
        for c, (centred_k1, x_kd) in self._looking.items():
            above = norm_t > c * snapshot.median_norm
            places, above_td = snapshot.document_n[seen][above], x[above] - snapshot.reference_d
            x_kd.index_add_(0, places, above_td)
            centred_k1.index_add_(0, places, above_td.square().sum(1, keepdim=True))
        self._looked_at += len(x)
        if self._looked_at == self.n_tokens:
            self._above |= self._looking
            self._looked_at = 0

    def group_sums(self, name: str) -> dict[int, Sums]:
        """The sums of each group of one name, by group number."""
        sums = self._groups.get(name, KeyedSums(self.d_in))
        *parts, _ = (part.cpu() for part in sums.table())
        return {key: Sums(*(part[i : i + 1] for part in parts)) for key, i in sorted(sums.keys.items())}

    def snapshot(self) -> Snapshot:
        """What was gathered so far, for figures that `compute` does not give.

        Raises:
            DataError: no token was measured.
        """
        if self._reference_d is None:
            raise DataError("No token was measured.")
        order_k = torch.tensor(list(self._sums.keys)).argsort()  # they came in an order that depends on batches
        *sums, error_kd = (part.cpu()[order_k] for part in self._sums.table())
        return Snapshot(
            columns_nc=torch.cat(self._columns),
            document_n=order_k.argsort()[torch.cat(self._documents)],
            sums=Sums(*sums),
            error_kd=error_kd,
            reference_d=self._reference_d.cpu(),
            by_dimension_2d=self._by_dimension.cpu(),
            worst=self._worst,
            largest=self._largest,
            above=self._above,
            fired_f=self._fired_f if self.d_sae else None,
            first_fired_f=self._first_fired_f,
            has_documents=bool(self._has_documents),
            top_fractions=self.top_fractions,
            norm_multiples=self.norm_multiples,
            rules=self.rules,
        )

    def compute(self, *, resamples: int = 1000, seed: int = 0, level: float = 0.95) -> ReconstructionMetrics:
        """The metrics of all tokens so far, with intervals by bootstrap where documents were given.

        Args:
            resamples: 0 for none.
            seed: of the draws; the same for two SAEs makes their differences paired.
            level: of the intervals.

        Raises:
            DataError: no token was measured.
        """
        return summarise(self.snapshot(), Sampling(resamples, seed, level))
