// Everything that rows.inc uses from outside, included before any target is set.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "../distances.h"
#include "../tables.h"
#include "rows.h"
