"""HTTP servers on loopback that stand in for the public services a job talks to."""
