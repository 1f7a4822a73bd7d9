"""`python -m agent` is `edge-agent`."""

from agent.app import main

raise SystemExit(main())
