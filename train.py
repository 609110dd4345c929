"""Train the five stages: `python train.py --help` lists what can be set."""

from aneurysm.commands import train

if __name__ == "__main__":
    train()
