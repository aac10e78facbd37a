"""Draft training, stage by stage: what each of FastDraft's stages does for the acceptance of a draft on held-out code.

    python scripts/bench_draft.py --out runs/bench_draft

Trains a draft of tinycode-draft's shape for tinycode from random weights with a small budget, for each seed: text (the
standard library's tests), code (its modules, two to one with the tests), alignment (what tinycode writes). Rows of
scripts/results/bench_draft-*.json: acceptance, block efficiency and memory-bound speed-up before and after each stage
and seed, and the shipped pair's. Expected: each stage raises the expected acceptance for each seed. Figures are counts
and losses, not times, so a busy machine does not change them; about 5 minutes on two idle cores.

Killed, the same command goes on. The seeds take their answers from the target anew.

Stability: experimental.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench_draft"), help="checkpoints of each seed")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--stages", default="text=60,code=120,align=60", help="updates of each")
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--answers", type=int, default=96)
    parser.add_argument("--loss", default="kl")
    args = parser.parse_args(argv)

    import jaxinfer
    from jaxinfer.cli import compiled
    from jaxinfer.cli.train_draft import stages_of
    from jaxinfer.measure.results import Results
    from jaxinfer.models import Step
    from jaxinfer.train import draft, text
    from jaxinfer.train.draft_answers import Asking
    from jaxinfer.train.draft_report import Measuring, report

    compiled.use_cache()  # the seeds run the same programs
    lm, shipped = (jaxinfer.load(name, dtype="float32") for name in ("tinycode", "tinycode-draft"))
    target = draft.Model(lm.step, lm.params)
    code = text.load(None, lm.tokenizer, vocab_size=lm.step.vocab_size)
    step = Step(draft.draft_config(lm.step.config, layers=2, width=192))
    settings = draft.Settings(
        stages_of(args.stages),
        batch_tokens=args.batch_tokens,
        loss=args.loss,
        prompt_weight=1.0,
        asking=Asking(args.answers),
    )
    measuring = Measuring()
    kept = Results("bench_draft", args.results, settings=dataclasses.asdict(settings) | {"seeds": args.seeds})
    pair = (lm.step, lm.params, shipped.step, shipped.params)
    kept.add(seed=None, stage="shipped", **_rounded(report(*pair, code.held_out, measuring)))
    print(kept.rows[-1], flush=True)
    for seed in map(int, args.seeds.split(",")):
        begun = draft.Model(step, draft.init_params(step, seed))
        _, reports = draft.train_draft(
            target, begun, code, dataclasses.replace(settings, seed=seed), args.out / f"seed{seed}",
            measuring=measuring,
            loop_config={"save_seconds": 60.0, "curve": False},
            told=lambda stage, found: print(stage, _rounded(found), flush=True),
        )  # fmt: skip
        for stage, found in reports.items():
            kept.add(seed=seed, stage=stage, **_rounded(found))
        print(f"wrote {kept.save()}", flush=True)


def _rounded(found: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in found.items()}


if __name__ == "__main__":
    main()
