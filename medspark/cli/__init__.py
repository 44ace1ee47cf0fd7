"""The `medspark` console program: one module per subcommand."""
