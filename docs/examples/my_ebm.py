import mebm
import torch.nn.functional as F


class Softplus(mebm.Method):  # trial: {method: my_ebm.py:Softplus}
    temperature: float = mebm.field(1.0, gt=0, description="T of the energy")  # searchable, in tables

    def energy(self, net, x):
        return net(x) / self.temperature

    def sample(self, ctx):
        return ctx.langevin(ctx.chains())  # optional: this is the default

    def loss(self, e_data, e_samples, ctx):
        return F.softplus(e_data - e_samples).mean()
