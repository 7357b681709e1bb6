"""Segment new scans with a trained model: `python benchmarks/predict.py --run ID --input scan.nii.gz --output DIR`."""
import sys
from pathlib import Path

from data_prep import DataError
from ssl4mis import config
from ssl4mis.errors import UserError

INPUT = ("scans: NIfTI, NRRD, MetaImage, DICOM folders, folders of these; several channels as one file, or as files "
         "with the modality in their name (or _0000, _0001)")


def main(argv: list[str]) -> int:
    """Exit status: 0 done, 1 some of the scans could not be segmented, 2 bad input, 130 stopped and resumable."""
    parser = config.Parser(prog="predict.py", allow_abbrev=False, description=__doc__)
    parser.add_argument("--run", required=True, help="id of a run, its beginning, its folder, or an exported model")
    parser.add_argument("--input", nargs="+", type=Path, required=True, help=INPUT)
    parser.add_argument("--output", type=Path, required=True, help="folder; a scan whose results are there is skipped")
    parser.add_argument("--probabilities", action="store_true", help="write the probability of each class, too")
    parser.add_argument("--preview", action="store_true", help="write a PNG with the contours on three planes, too")
    parser.add_argument("--overwrite", action="store_true", help="segment again what is there")
    parser.add_argument("--stride", type=list[int], help="of the window, written [56,56,40]; default half the window")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="cpu, cuda, or auto")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where runs and records are")
    options = vars(parser.parse_args(config.in_order(argv)))
    from ssl4mis.predict import predict  # which loads torch

    try:
        failed = predict(options.pop("run"), options.pop("input"), options.pop("output"), **options)
    except (UserError, DataError) as error:
        print(f"predict.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on with the next scan", file=sys.stderr)
        return 130
    if failed:
        print("\n".join([f"scans that could not be segmented: {len(failed)}", *failed]), file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
