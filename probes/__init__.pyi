from .capture.needs import Need as Need
from .models.interop import from_bridge as from_bridge
from .models.interop import from_hf as from_hf
from .models.interop import from_nnsight as from_nnsight
from .models.load import load_model as load_model
from .points import Address as Address
from .reducers import Reducer as Reducer
from .store.store import ActivationStore as ActivationStore
