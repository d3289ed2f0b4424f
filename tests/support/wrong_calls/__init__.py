"""Every wrong use of the public interface that is tested, in one list.

python -m tests.support.wrong_calls      how many there are of each kind
"""

from .commands import USES as COMMANDS
from .conversion import USES as CONVERSION
from .modules import USES as MODULES
from .operators import USES as OPERATORS
from .plans import USES as PLANS
from .use import WrongUse, check

WRONG_USES: list[WrongUse] = [*MODULES, *CONVERSION, *PLANS, *COMMANDS, *OPERATORS]

__all__ = ["WRONG_USES", "WrongUse", "check"]
