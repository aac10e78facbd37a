"""Batch inference over files: rows, readers, a job directory that survives kills, a driver that keeps slots full.

    lm = jaxinfer.load(model)
    job = open_job(
        output, inputs, fingerprint={"model": ..., "versions": ...}, codec=lm.codec,
        settings=lambda survey: Settings.of(survey, slots=32, max_length=..., eos_ids=len(lm.codec.eos_ids)).to_json(),
    )
    engine = DecodeEngine(lm.step, lm.params, Settings.from_json(job.manifest.settings))
    with stop_on() as stop:
        outcome = Runner(job, engine, lm.codec, stop=stop).run()

The names are in `job`, `engine` and `runner`; all but `engine` and `runner` do without jax.

Stability: experimental.
"""
