"""`CurvatureMonitor`."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from jaxtyping import Num
from torch import Tensor, nn

from lightning_lowrank.measuring.number_source import Detail
from lightning_lowrank.monitors.curvature.source import Curvature, Level
from lightning_lowrank.reports.alerts.rules import Alert
from lightning_lowrank.watching.monitor import Monitor, cadence, probe_of

# Said where curvature is not believed.
WRONG = (
    "a layer whose backward pass cannot be differentiated, such as a custom autograd function that detaches; "
    "choose other layers with match"
)


class CurvatureMonitor(Monitor):
    """Curvature of the training's own loss: sharpness compared with the edge of stability, and estimates of Hessian,
    Gauss-Newton and Fisher matrix.

    The loss is seen on the graph of the training step itself, without a second forward pass or loss function. Sometimes
    this would change the training's last bits, or show nothing (fused attention, compiled modules, static graphs of
    DDP). Then a kept batch is run through `training_step` again, and all state that this changes is restored. A message
    at the start says which of the two is used.

    Args:
        level: "light": batch sharpness. "standard": also the top of the spectrum, traces, critical sharpness, and the
            shares of gradient, update and displacement in the top directions; participation ratios except for the
            Hessian. "full": also the whole spectrum by quadrature: effective ranks, negative mass, the smallest
            eigenvalue, densities.
        operators: Any of `hessian`, `gauss_newton`, `empirical_fisher`, `monte_carlo_fisher`. Empty for critical
            sharpness only, which needs only forward passes, so it works if the loss cannot be differentiated twice.
        top_k: Number of top directions to track.
        every_n_steps: Cadence in optimizer steps; default 100, 2000 or 30000 by level, for at most 5 % of the time.
        batch: "live": the loss of the step. "fixed": always the loss of the first batch seen, so that curves are
            comparable over time.
        loss_fn: `(module, batch) -> loss`, used instead of `training_step`; the batch is then fixed.
        output_module: The layer whose output enters the loss, if the loss is not one of torch's functions.
        match: Parameters: globs, `re:REGEX`, `type:LAYERCLASS`; all trained ones by default.
        exclude: Patterns of what to leave out, as for `match`.
        detail: What loggers get: "core", "standard" or "all"; the tab and reports have everything.
        per_site: Curves of single parameters: `True`, `False`, or "auto" (from "standard" on, if there are at most
            100).
        seed: Seed for the random vectors.
        name: Prefix of all tags.
        alerts: Alert rules; "default" warns if products with the Hessian are wrong.
        max_overhead: Largest increase of training time, 0.01 for 1 %: a `Budget` chooses the cadence.

    Raises:
        ValueError: An option is unknown. When training starts: a pattern matches nothing, or the loss cannot be seen;
            the message says what to do.

    Examples:
        >>> CurvatureMonitor("light").recorders[0].quantities[3:]
        ['batch_sharpness', 'batch_sharpness_over_threshold']
    """

    word = "curvature"

    @staticmethod
    def usual_alerts(quantities: Sequence[str]) -> Sequence[Alert]:
        """Products with the Hessian are wrong; all curvature is then NaN."""
        return [Alert("curvature_valid", below=0.5, for_samples=1, warm_up_samples=0, cause=WRONG)]

    def __init__(
        self,
        level: Level = "light",
        operators: Sequence[str] = ("hessian", "gauss_newton"),
        top_k: int = 5,
        every_n_steps: int | None = None,
        batch: Literal["live", "fixed"] = "live",
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        output_module: str | None = None,
        match: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        detail: Detail = "core",
        per_site: bool | Literal["auto"] = "auto",
        seed: int = 0,
        name: str | None = None,
        *,
        alerts: Sequence[Alert] | Literal["default"] | None = "default",
        max_overhead: float | None = None,
    ) -> None:
        chosen: dict[str, Any] = {
            "batch": batch,
            "loss_fn": loss_fn,
            "output_module": output_module,
            "match": match,
            "exclude": exclude,
        }
        source = self._source = Curvature(level, operators, top_k=top_k, **chosen)
        schedule = cadence(every_n_steps, max_overhead, source.effort.every)
        super().__init__(
            probe_of(source, schedule), detail=detail, per_site=per_site, seed=seed, alerts=alerts, name=name
        )

    def top_directions(self) -> list[tuple[nn.Parameter, Num[Tensor, "k ..."]]]:
        """Parameters with their parts of the top eigenvectors of the Hessian, which are orthonormal.

        Returns:
            Those of the last sample, the largest eigenvalue first. Empty before the first sample; NaN if products with
            the Hessian were wrong.

        Raises:
            ValueError: Directions are not tracked, because of `level="light"` or operators without the Hessian.
        """
        if "hessian" not in self._source.operators or not self._source.effort.probes:
            raise ValueError(
                f"{self!r} does not track directions of the Hessian; it needs level='standard' and "
                "operators=['hessian']"
            )
        return self._source.top_directions()
