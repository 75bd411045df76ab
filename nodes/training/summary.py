"""What a finished training says about itself, in words."""

from pathlib import Path

from ... import hgr_models

DISTANCES = {"before": "before", "error": "after", "held_out": "after on runs that were not trained on"}  # of a step report
PROOFS = {"upper_bound_prompts": "clean prompts", "upper_bound_runs": "clean runs", "upper_bound_pictures": "clean pictures"}


def summary(session, hgr: hgr_models.HGR, path: Path) -> str:
    """What was trained, in words."""
    proof = hgr.info.training["calibration"]
    lines = [f"{path}: {', '.join(hgr.info.categories)}", *session.notes]
    for part, training in session.trainings.items():
        last = [entry for entry in session.history if entry["part"] == part][-20:]
        text = f"{part} redirector: {training.step} steps, distance to the safe direction"
        for key, what in DISTANCES.items():
            values = [entry[key] for entry in last if entry.get(key) is not None]
            text += f", {sum(values) / len(values):.2f} {what}" if values else ""
        lines.append(text)
    bounds = [f"{100 * proof[key]:.2g} % of {what}" for key, what in PROOFS.items() if key in proof]
    lines.append(f"false alarms, 95 % upper bounds: {', '.join(bounds)} (asked for: {100 * proof['rate']:.2g} % of pictures)")
    return "\n".join(lines)
