"""What runs experiments, from the ground up: config, build, summary, teachers, experiment | tasks | jobs | planning,
executors, cluster, search, sweeps. A file imports those before it."""
