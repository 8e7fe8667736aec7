"""`python -m job`: the same command as `job`."""

from job.cli import main

if __name__ == "__main__":
    main()
