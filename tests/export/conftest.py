from handmade_runs import make_classifier, make_run  # noqa: F401 (fixtures)
