"""Studies: models x prompt sets x analyses x options x seeds, run once each, on one machine or on a cluster."""

from analyses.studies.cells import Cell, expand
from analyses.studies.definition import AnalysisSpec, Override, PromptSet, Study, StudyModel
from analyses.studies.file_lines import StudyError
from analyses.studies.local_engine import run_local
from analyses.studies.study_file import read_study
from analyses.studies.study_folder import StudyFolder
from analyses.studies.study_run import StudyRun, run_study

__all__ = [
    "AnalysisSpec",
    "Cell",
    "Override",
    "PromptSet",
    "Study",
    "StudyError",
    "StudyFolder",
    "StudyModel",
    "StudyRun",
    "expand",
    "read_study",
    "run_local",
    "run_study",
]
