"""`jaxinfer doctor`: what this machine is, and which form every operation takes on it.

Stability: experimental.
"""

from typing import Any

from jaxinfer.cli.options import AsJson


def doctor(as_json: AsJson = False) -> None:
    """Show versions, devices, memory, the form that each operation takes here and why not another, and the models.

    \b
    Example:
      jaxinfer doctor --json > machine.json
    """
    from jaxinfer.cli import machine
    from jaxinfer.cli.output import print_json

    report = machine.report()
    if as_json:
        print_json(report)
    else:
        _print(report)


def _print(report: dict[str, Any]) -> None:
    from jaxinfer.cli.output import print_table, size

    host, memory = report["host"], report["memory"]
    facts = [
        ("system", f"{host['system']}, Python {host['python']}"),
        (
            "processor",
            f"{host['processor']}, {host['cores']} cores: {', '.join(host['features']) or 'features unknown'}",
        ),
        ("load", "unknown" if host["load"] is None else f"{host['load']:.2f} runnable processes in the last minute"),
        ("memory", f"{size(memory['available'])} free of {size(memory['total'])}"),
        ("compilation cache", report["compilation_cache"]),
    ]
    for device in report["devices"]:
        held = "" if device["memory"] is None else f", {size(device['memory'])}"
        facts.append((f"device {device['id']}", f"{device['platform']} {device['kind']}{held}"))
    print_table(("what", "here"), facts)
    versions = [(name, v["version"] or "not installed", v["for"]) for name, v in report["versions"].items()]
    print_table(("package", "version", "for"), versions)
    forms = []
    for form in report["forms"]:
        others = "; ".join(f"{name}: {reason}" for name, reason in form["others"].items())
        forms.append((form["op"], form["form"], form["why"], others))
    print_table(("operation", "form here", "why", "other forms"), forms)
    models = [(m["name"], m["state"], "" if m["bytes"] is None else size(m["bytes"])) for m in report["models"]]
    print_table(("packaged model", "state", "size"), models)
