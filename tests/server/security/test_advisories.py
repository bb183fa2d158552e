"""Every advisory on servers like this one that applies to us has a test, here or in the room it belongs to."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[2]
KEYS, REQUESTS, ENGINE = (f"server/security/test_{name}.py" for name in ("keys", "requests", "engine"))
LIMITS, MUTATIONS, STRUCTURED = "e2e/test_limits.py", "checkpoint/test_mutations.py", "structured/test_compiler.py"
TABLE = [
    ("CVE-2026-48746, CVE-2026-48710", KEYS, "test_cve_2026_48746_and_48710_no_host_header_opens_a_route"),
    ("GHSA-h3rc-6mm3-gc2m", KEYS, "test_ghsa_h3rc_6mm3_gc2m_every_route_but_health_asks_for_the_key"),
    ("CVE-2025-59425", KEYS, "test_cve_2025_59425_every_key_is_compared_as_a_hash_in_constant_time"),
    ("CVE-2026-34756", REQUESTS, "test_cve_2026_34756_huge_n_is_refused_at_once"),
    ("CVE-2024-8939, CVE-2024-8768", REQUESTS, "test_cve_2024_8939_and_8768_degenerate_requests_are_a_400"),
    ("GHSA-87x5-vmc3-756j", REQUESTS, "test_ghsa_87x5_vmc3_756j_prompts_times_n_are_bounded"),
    ("GHSA-wpww-v874-ph2p", REQUESTS, "test_ghsa_wpww_v874_ph2p_every_string_of_a_body_has_a_greatest_length"),
    (
        "GHSA-25q3-v2hm-8vpf",
        REQUESTS,
        "test_ghsa_25q3_v2hm_8vpf_token_ids_outside_the_vocabulary_never_reach_the_engine",
    ),
    ("CVE-2025-48956", LIMITS, "test_cve_2025_48956_headers_without_end_get_a_431_and_fill_no_memory"),
    (
        "CVE-2025-61620, CVE-2025-62426",
        REQUESTS,
        "test_cve_2025_61620_and_62426_templates_and_their_switches_are_not_the_clients",
    ),
    ("templates without end", "text/test_template_limits.py", "test_templates_without_end_are_ended"),
    (
        "CVE-2025-48942, -48943, -48944, GHSA-vrq3-r879-7m65",
        STRUCTURED,
        "test_hostile_grammar_is_refused_or_works_in_bounded_time",
    ),
    (
        "CVE-2025-29770, CVE-2025-32381",
        STRUCTURED,
        "test_cache_holds_to_its_bound_and_drops_what_was_used_longest_ago",
    ),
    (
        "CVE-2025-48887, GHSA-j828-28rj-hfhp",
        REQUESTS,
        "test_cve_2025_48887_and_ghsa_j828_28rj_hfhp_parsers_take_linear_time",
    ),
    ("CVE-2025-9141", REQUESTS, "test_cve_2025_9141_arguments_that_are_python_stay_text"),
    ("eval, exec, pickle, torch.load, yaml.load", "test_arrows.py", "test_no_product_code_runs_what_a_file_says"),
    ("CVE-2026-44222", REQUESTS, "test_cve_2026_44222_no_special_token_comes_from_what_a_user_says"),
    ("CVE-2026-44223", ENGINE, "test_cve_2026_44223_no_pair_of_sampling_options_ends_the_engine"),
    ("CVE-2026-9540", ENGINE, "test_cve_2026_9540_clients_that_leave_at_any_moment_leave_nothing_behind"),
    ("CVE-2025-62164, GHSA-pr7f-p5mw-fc87", REQUESTS, "test_cve_2025_62164_prompt_embeds_are_not_there"),
    (
        "CVE-2025-62372, CVE-2026-22773, -22778, CVE-2025-6242, CVE-2026-24779, -25960, -34753",
        REQUESTS,
        "test_cve_2025_6242_62372_and_2026_22773_22778_24779_25960_34753_media_is_refused_and_not_fetched",
    ),
    ("CVE-2026-22807, CVE-2025-66448", MUTATIONS, "test_nothing_in_a_booby_trapped_folder_runs"),
    (
        "CVE-2025-24357",
        "checkpoint/test_shards.py",
        "test_a_folder_with_only_pickles_is_refused_and_the_pickle_never_opened",
    ),
    (
        "CVE-2025-25183, CVE-2025-46722",
        ENGINE,
        "test_cve_2025_25183_and_46722_blocks_are_known_by_a_keyed_hash_of_all_their_tokens",
    ),
    ("CVE-2025-46570", ENGINE, "test_cve_2025_46570_a_prompt_of_one_key_is_not_found_by_another"),
    (
        "ShadowMQ: CVE-2025-30165, -32444, -29783, -30202, -47277, CVE-2024-9052, -9053, -11041",
        LIMITS,
        "test_shadowmq_cve_2025_30165_and_32444_one_port_listens_and_it_speaks_http",
    ),
    (
        "SGLang CVE-2026-3059, -3060, -3989, -7301, CVE-2025-10164",
        KEYS,
        "test_sglang_cve_2026_3989_and_7301_no_control_route_is_on_the_public_port",
    ),
    ("Triton CVE-2025-23310, -23311", REQUESTS, "test_triton_cve_2025_23310_and_23311_bodies_in_single_bytes"),
    ("Triton CVE-2025-33201, CVE-2026-24173", LIMITS, "test_a_body_that_goes_on_after_its_refusal_is_cut_off"),
    (
        "Triton CVE-2025-23319, -23320, -23334",
        REQUESTS,
        "test_triton_cve_2025_23319_23320_23334_errors_name_no_paths_and_no_code",
    ),
    ("llama.cpp #22606", "structured/test_spec.py", "test_spec_no_compiler_should_see_is_refused"),
]


@pytest.mark.parametrize(("advisory", "file", "name"), TABLE, ids=[row[0] for row in TABLE])
def test_advisory_has_a_test(advisory: str, file: str, name: str) -> None:
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    found = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert found.count(name) == 1
