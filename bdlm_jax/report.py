"""results.md from results.json."""
from pathlib import Path


def write_report(folder, results):
    lines = []
    for r in results["rows"]:
        if r["metric"].split("/")[0] in ("hr@1", "ndcg@10", "auc"):
            lines.append(f"{r['model']:<25} {r['slice']:<10} {r['metric']:<20} {r['value']:.4f} {r['users']}")
    text = "\n".join(lines) + "\n"
    (Path(folder) / "results.md").write_text(text)
