"""Train the five stages: `python train.py --help` lists what can be set."""

from aneurysm.train import main

if __name__ == "__main__":
    main()
