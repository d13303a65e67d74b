"""`python -m job`: the entrypoint of the image."""

from job.cli import main

raise SystemExit(main())
