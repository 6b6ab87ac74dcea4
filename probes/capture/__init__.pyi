from .activations import Activations as Activations
from .needs import CapturePlan as CapturePlan
from .needs import Feature as Feature
from .needs import Need as Need
from .needs import make_plan as make_plan
from .run import capture as capture
from .run import context_of as context_of
from .run import plan_capture as plan_capture
