"""Read scans with a trained bundle: python predict.py bundle=<dir> input=<scan or folder> output=<dir>"""

from aneurysm.commands import predict

if __name__ == "__main__":
    predict()
