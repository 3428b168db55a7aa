"""What `distill store` found, as tables for people. Unit of data: one result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:  # what computes them imports pyarrow and more
    from student_trainer.store_compact import Compaction
    from student_trainer.store_sampling import StorePlan, TeacherCheck
    from student_trainer.store_stats import StoreDifference, StoreSummary
    from student_trainer.store_verify import Verification

VIEWS_SHOWN = 50


def bytes_said(size: float) -> str:
    """A size as a person says it."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}" if unit != "B" else f"{size:.0f} B"
        size /= 1000
    return f"{size:.3g} TB"


def plan_table(plan: StorePlan) -> Table:
    """Each way of keeping the labels; the run's own is the first."""
    title = f"{plan.num_images} images x {plan.num_views} views, from {plan.num_sampled} crops that the teacher was asked about"
    table = _table(title, "max_tv", "temperatures", "bytes a label", "p99", "encodings", "largest error", "in all", "")
    for option in plan.options:
        sizes = option.sizes
        table.add_row(
            f"{sizes.max_tv:g}",
            ", ".join(f"{t:g}" for t in sizes.temperatures),
            f"{sizes.mean_bytes:.0f}",
            f"{sizes.p99_bytes:.0f}",
            _mix(sizes.encodings),
            f"{sizes.largest_tv:.3g}",
            bytes_said(option.total_bytes),
            "this run" if option.is_runs else "",
        )
    own, dense = plan.options[0], plan.options[0].sizes.dense16_bytes
    total = own.total_bytes + (dense - own.sizes.mean_bytes) * plan.num_images * plan.num_views
    table.add_row("", "", str(dense), str(dense), "dense16 for all", "", bytes_said(total), "for comparison")
    return table


def stats_tables(summary: StoreSummary) -> list[Table]:
    """The store, its errors, its views."""
    identity = summary.identity
    whole = _table(summary.where, "", "")
    mean = summary.size_bytes / max(1, summary.num_labels)
    rows = {
        "labels": str(summary.num_labels),
        "segments": str(summary.num_segments),
        "size": f"{bytes_said(summary.size_bytes)}, {mean:.0f} B a label with row and image id",
        "teacher": identity.fingerprint[:12],
        "classes": str(identity.num_classes),
        "crops": f"{identity.recipe.kind} {identity.recipe.image_size} px, seed {identity.seed}",
        "images": identity.images[:12] + (f", {summary.num_images} of them" if summary.num_images else ""),
    }
    if summary.num_read:
        rows["records"] = f"{summary.record_bytes.mean:.0f} B a label, p99 {summary.record_bytes.p99:.0f} B"
        rows["encodings"] = _mix(summary.encodings)
    for name, value in rows.items():
        whole.add_row(name, value)
    errors = _table("errors", "kept for temperatures", "labels", "TV mean", "TV p99", "TV largest", "logit p99", "logit largest")
    for e in summary.errors:
        numbers = (e.max_tv.mean, e.max_tv.p99, e.max_tv.largest, e.max_logit_error.p99, e.max_logit_error.largest)
        errors.add_row(", ".join(f"{t:g}" for t in e.temperatures), str(e.num_labels), *(f"{number:.3g}" for number in numbers))
    of = "of all images" if summary.num_images else "of the fullest view"
    views = _table("views", "view", "labels", of, "shards", "segments", "size")
    for v in summary.views[:VIEWS_SHOWN]:
        views.add_row(str(v.view), str(v.num_labels), f"{v.complete:.1%}", str(v.num_shards), str(v.num_segments), bytes_said(v.size_bytes))
    if len(summary.views) > VIEWS_SHOWN:
        views.add_row("...", f"{len(summary.views) - VIEWS_SHOWN} more; --json has all", "", "", "", "")
    return [whole, *([errors] if summary.errors else []), views]


def verify_tables(where: str, found: Verification) -> list[Table]:
    """What was looked at, and every problem."""
    whole = _table(where, "segments", "labels", "size", "problems", "mended", "left by crashes")
    mended = len(found.problems) - found.num_open
    whole.add_row(
        str(found.num_segments),
        str(found.num_labels),
        bytes_said(found.size_bytes),
        str(len(found.problems)),
        str(mended),
        str(len(found.leftovers)),
    )
    if not found.problems:
        return [whole]
    problems = _table("problems", "what", "segment", "labels", "says", "")
    for problem in found.problems:
        problems.add_row(problem.kind, problem.file, str(problem.labels), problem.says, "mended" if problem.repaired else "")
    return [whole, problems]


def check_table(found: TeacherCheck, where: str) -> Table:
    """Stored labels against the teacher, at each temperature."""
    title = f"{found.num_checked} labels of {where} against the teacher (logit tolerance {found.logit_tolerance:g})"
    table = _table(title, "temperature", "true TV mean", "p99", "largest", "stated p99", "stated largest", "over their bound")
    for at in found.temperatures:
        numbers = (at.true_tv.mean, at.true_tv.p99, at.true_tv.largest, at.stated_tv.p99, at.stated_tv.largest)
        table.add_row(f"{at.temperature:g}", *(f"{number:.3g}" for number in numbers), str(at.beyond))
    return table


def compact_table(done: Mapping[str, Compaction]) -> Table:
    """Before and after."""
    table = _table("compacted", "store", "units merged", "segments", "labels", "size", "leftovers removed")
    for where, d in done.items():
        table.add_row(
            where,
            str(d.num_units),
            f"{d.num_segments_before} -> {d.num_segments}",
            f"{d.num_labels_before} -> {d.num_labels}",
            f"{bytes_said(d.size_bytes_before)} -> {bytes_said(d.size_bytes)}",
            str(d.num_leftovers),
        )
    return table


def diff_table(found: StoreDifference) -> Table:
    """A against B."""
    table = _table(f"A {found.a}\nB {found.b}", "", "")
    for name, (a, b) in found.identity.items():
        table.add_row(f"another {name}", f"A {a}\nB {b}")
    table.add_row("labels only in A", str(found.only_a))
    table.add_row("labels only in B", str(found.only_b))
    table.add_row("in both", str(found.both))
    if found.other_images:
        table.add_row("of these, of another image", str(found.other_images))
    tv = found.tv
    table.add_row(f"TV between them at T={found.temperature:g}", f"mean {tv.mean:.3g}, p99 {tv.p99:.3g}, largest {tv.largest:.3g}")
    table.add_row("same likeliest class", f"{found.same_top_class:.2%}")
    return table


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=any(headings))
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _mix(encodings: Mapping[str, int]) -> str:
    total = sum(encodings.values()) or 1
    return ", ".join(f"{name} {count / total:.0%}" for name, count in encodings.items())
