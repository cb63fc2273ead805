"""A spec becomes a bundle of programs step by step; each step is a plain function between two types:

    document.load_document   YAML text, --set      -> Document      data and the place of every value
    load.load_spec           Document              -> LoadedSpec    field types and ranges (spec.py)
    resolve.resolve_spec     LoadedSpec, facts     -> ResolvedSpec  SI units; every open question a set or a range
    choose.choose_plan       ResolvedSpec          -> Plan          every decision, and why
    check.check_plan         Plan                  -> violations    none, or the plan is not legal
    emit.emit_bundle         Plan                  -> Bundle        files in memory

`cli.py` calls them in this order and prints; `write.py` puts the bundle on disk. Nothing is imported here: `--help` is fast.
"""
