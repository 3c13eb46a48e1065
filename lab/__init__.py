"""What runs experiments, from the ground up: config, build, summary, teachers, experiment | tasks | jobs, remote |
planning, executors, cluster, ray_engine, search, sweeps. A file imports those before it."""
