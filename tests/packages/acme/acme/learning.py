"""A credit method with learned state, an optimizer with a critic, and an offline DPO."""

import torch
import turnwise


class LearnedSplit(turnwise.CreditAssigner):
    """Splits the outcome over turns in learned proportions (by turn index), conserving it."""

    needs = frozenset({"group"})

    def __init__(self, rate: float = 0.5):
        self.rate = rate
        self.shares = torch.ones(8)
        self.fitted = 0

    def assign(self, batch):
        k = batch.turn_mask.shape[1]
        shares = self.shares[:k] * batch.turn_mask
        credit = batch.outcome.unsqueeze(1) * shares / shares.sum(1, keepdim=True)
        credit = credit - (credit * batch.turn_mask).sum(0) / batch.turn_mask.sum(0)
        advantages = credit.gather(1, batch.turn.clamp(min=0)) * batch.mask
        return turnwise.Credit(advantages, None, credit * batch.turn_mask)

    def fit(self, batch):
        k = batch.turn_mask.shape[1]
        lengths = torch.stack([(batch.turn == i).sum(1) for i in range(k)], 1).float().mean(0)
        self.shares[:k] += self.rate * (lengths / lengths.sum() - self.shares[:k])
        self.fitted += 1

    def state_dict(self):
        return {"shares": self.shares, "fitted": self.fitted}

    def load_state_dict(self, state):
        self.shares, self.fitted = state["shares"].clone(), state["fitted"]


class ActorCritic(turnwise.Optimizer):
    """REINFORCE with a linear critic on the hidden states."""

    consumes = frozenset({"advantages"})
    provides = frozenset({"values"})

    def __init__(self, lr: float = 1e-3):
        self.lr = lr

    def setup(self, policy):
        torch.manual_seed(0)
        self.critic = torch.nn.Linear(policy.hidden_size, 1)
        self.torch_optimizer = torch.optim.SGD(
            [*policy.parameters(), *self.critic.parameters()], lr=self.lr
        )

    def prepare(self, policy, batch):
        batch.values, batch.bootstrap = (
            torch.zeros(batch.mask.shape),
            torch.zeros(len(batch.episodes)),
        )
        with torch.no_grad():
            for micro in policy.micro_batches(batch.rows, 2048):
                out = policy.score(micro, batch.temperature)
                batch.values[micro.episode, micro.action] = self.critic(out.hidden).squeeze(-1)

    def update(self, policy, batch):
        total = 0.0
        for micro in policy.micro_batches(batch.rows, 2048):
            out = policy.score(micro, batch.temperature)
            loss = -(out.logprobs * micro.take(batch.credit.advantages)).sum()
            if batch.credit.value_targets is not None:
                loss = (
                    loss
                    + (
                        (
                            self.critic(out.hidden).squeeze(-1)
                            - micro.take(batch.credit.value_targets)
                        )
                        ** 2
                    ).sum()
                )
            loss = loss / batch.mask.sum()
            loss.backward()
            total += float(loss)
        self.torch_optimizer.step()
        self.torch_optimizer.zero_grad()
        return {"loss": total}

    def state_dict(self):
        return dict(self.critic.state_dict().items())

    def load_state_dict(self, state):
        self.critic.load_state_dict(dict(state))


class DPO(turnwise.Optimizer):
    """-log sigmoid(beta * ((log pi - log ref)(better) - (log pi - log ref)(worse))), Rafailov et
    al. 2023, eq. 7."""

    consumes = frozenset({"comparisons"})
    provides = frozenset()

    def __init__(self, beta: float = 0.1, lr: float = 1e-2):
        self.beta, self.lr = beta, lr

    def setup(self, policy):
        policy.freeze_reference()
        self.torch_optimizer = torch.optim.SGD(policy.parameters(), lr=self.lr)

    def prepare(self, policy, batch):
        batch.reference_logprobs = policy.logprobs(batch, reference=True)

    def update(self, policy, batch):
        sums = torch.zeros(len(batch.episodes))
        for micro in policy.micro_batches(batch.rows, 10_000):
            sums = sums.index_add(0, micro.episode, policy.score(micro, batch.temperature).logprobs)
        ratio = sums - batch.reference_logprobs.sum(1)
        margin = ratio[batch.pairs.better] - ratio[batch.pairs.worse]
        loss = -(torch.nn.functional.logsigmoid(self.beta * margin) * batch.pairs.weight).mean()
        loss.backward()
        self.torch_optimizer.step()
        self.torch_optimizer.zero_grad()
        return {"loss": float(loss), "margin": float(margin.mean())}

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass
