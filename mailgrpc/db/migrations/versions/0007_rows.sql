-- Results come as rows. The driver looks at each element of an array, whether it is an array itself, in
-- Python and for longer than it takes to encode it; of a row it looks once. What is done with them is as
-- before: workers of the version before call that function by themselves.

CREATE TYPE attempt_result AS (
    delivery_id uuid, id uuid, number integer, call_id uuid, channel text, provider text,
    started_at timestamptz, ended_at timestamptz, outcome smallint, cause smallint,
    status_code integer, enhanced_code text, text text, provider_message_id text,
    retry_after_ms integer, state smallint, possibly_sent boolean, due_at timestamptz,
    wait_reason smallint, spares boolean, late_state smallint
);

-- See the function that it calls (0002, 0004).
CREATE FUNCTION record_outcomes(
    p_lane integer, p_results attempt_result[], p_without_proof smallint[]
) RETURNS void LANGUAGE plpgsql
AS $$
BEGIN
    PERFORM record_outcomes(p_lane, r.delivery_id, r.id, r.number, r.call_id, r.channel, r.provider,
        r.started_at, r.ended_at, r.outcome, r.cause, r.status_code, r.enhanced_code, r.text,
        r.provider_message_id, r.retry_after_ms, r.state, r.possibly_sent, r.due_at, r.wait_reason,
        r.spares, r.late_state, p_without_proof)
    FROM (SELECT array_agg(r.delivery_id) AS delivery_id, array_agg(r.id) AS id,
            array_agg(r.number) AS number, array_agg(r.call_id) AS call_id,
            array_agg(r.channel) AS channel, array_agg(r.provider) AS provider,
            array_agg(r.started_at) AS started_at, array_agg(r.ended_at) AS ended_at,
            array_agg(r.outcome) AS outcome, array_agg(r.cause) AS cause,
            array_agg(r.status_code) AS status_code, array_agg(r.enhanced_code) AS enhanced_code,
            array_agg(r.text) AS text, array_agg(r.provider_message_id) AS provider_message_id,
            array_agg(r.retry_after_ms) AS retry_after_ms, array_agg(r.state) AS state,
            array_agg(r.possibly_sent) AS possibly_sent, array_agg(r.due_at) AS due_at,
            array_agg(r.wait_reason) AS wait_reason, array_agg(r.spares) AS spares,
            array_agg(r.late_state) AS late_state
        FROM unnest(p_results) AS r) AS r;
END $$;
