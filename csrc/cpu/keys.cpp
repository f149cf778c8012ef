#define INQ_ISA portable
#define INQ_LANES 1
#include "keys_kernel.h"

namespace inq::cpu {

SelectKeys select_keys() { return INQ_IN_USE(select_keys); }
SurveyKeys survey_keys() { return INQ_IN_USE(survey_keys); }
CountCandidates count_candidates() { return INQ_IN_USE(count_candidates); }
LargestKey largest_key() { return INQ_IN_USE(largest_key); }

}  // namespace inq::cpu
